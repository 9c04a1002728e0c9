"""The formats that structured output holds strings to, checked by hand where `jsonschema` needs packages for it."""

from __future__ import annotations

import datetime
import re

import jsonschema

# RFC 3339, RFC 1123, ISO 8601 as RFC 3339 appendix A has it, RFC 3986.
_TIME = re.compile(r"(\d\d):(\d\d):(\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", re.IGNORECASE | re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_DATE_UNITS = r"(\d+Y(\d+M(\d+D)?)?|\d+M(\d+D)?|\d+D)"
_TIME_UNITS = r"T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S)"
_DURATION = re.compile(rf"P(\d+W|{_DATE_UNITS}({_TIME_UNITS})?|{_TIME_UNITS})", re.ASCII)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:([A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*")
_MAILBOX = re.compile(r"[^@\s]+@[^@\s]+|\"[^\"]*\"@[^@\s]+")

CHECKER = jsonschema.FormatChecker(("date", "ipv4", "ipv6", "uuid"))


@CHECKER.checks("time")
def is_time(value: object) -> bool:
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return not isinstance(value, str)
    offset = match[5][1:].split(":") if len(match[5]) > 1 else ["0", "0"]
    in_day = int(match[1]) < 24 and int(match[2]) < 60 and int(match[3]) <= 60
    return in_day and int(offset[0]) < 24 and int(offset[1]) < 60


@CHECKER.checks("date-time")
def is_date_time(value: object) -> bool:
    if not isinstance(value, str):
        return True
    try:
        datetime.date.fromisoformat(value[:10])
    except ValueError:
        return False
    return value[4:5] == "-" and value[10:11] in ("T", "t") and is_time(value[11:])


@CHECKER.checks("hostname")
def is_hostname(value: object) -> bool:
    if not isinstance(value, str):
        return True
    return len(value) <= 253 and all(_LABEL.fullmatch(label) for label in value.split("."))


@CHECKER.checks("duration")
def is_duration(value: object) -> bool:
    return not isinstance(value, str) or _DURATION.fullmatch(value) is not None


@CHECKER.checks("uri")
def is_uri(value: object) -> bool:
    return not isinstance(value, str) or _URI.fullmatch(value) is not None


@CHECKER.checks("email")
def is_email(value: object) -> bool:
    return not isinstance(value, str) or _MAILBOX.fullmatch(value) is not None


def validate(schema: dict[str, object], value: object) -> None:
    """By Draft 2020-12, formats included. Raises jsonschema.ValidationError."""
    jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(value)
