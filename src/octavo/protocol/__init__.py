"""What passes between the floors: plain data (msgspec structs), no torch and no policy."""
