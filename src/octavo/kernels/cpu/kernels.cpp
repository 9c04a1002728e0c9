// Kernels for CPUs, in plain C++ with GCC's vector extensions: one source for every instruction set, compiled for
// the machine it runs on. Elements are bfloat16 or float32; all arithmetic is in float32.

#include <cstdint>
#include <cstring>

namespace {

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

constexpr int LANES = 16;
constexpr int MAX_GROUP = 16;      // query heads that share a KV head
constexpr int SPLIT_TOKENS = 256;  // keys that one thread takes at a time
constexpr float LOWEST = -3.0e38f;

struct bf16 {
    uint16_t bits;
};

inline f32x16 load(const float* p) {
    f32x16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline f32x16 load(const bf16* p) {
    u16x16 half;
    std::memcpy(&half, p, sizeof half);
    return (f32x16)(__builtin_convertvector(half, u32x16) << 16);
}

inline void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(bf16* p, f32x16 v) {
    u32x16 bits = (u32x16)v;
    u32x16 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    rounded = v == v ? rounded : (bits | 0x400000u);
    u16x16 half = __builtin_convertvector(rounded >> 16, u16x16);
    std::memcpy(p, &half, sizeof half);
}

using f32x8 = float __attribute__((vector_size(32)));
using f32x4 = float __attribute__((vector_size(16)));

inline float sum(f32x16 v) {
    const f32x8 eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                        __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    const f32x4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                       __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

inline float largest(f32x16 v) {
    const f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    const f32x8 b = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    const f32x8 eight = a > b ? a : b;
    float most = eight[0];
    for (int i = 1; i < LANES / 2; i++) most = eight[i] > most ? eight[i] : most;
    return most;
}

// e^x for x <= 0, relative error about 2e-7: 2^n times a polynomial in the rest. Below -87 it is 0.
inline f32x16 exp_negative(f32x16 x) {
    const f32x16 scaled = x * 1.44269504f;
    const f32x16 shift = scaled + 12582912.0f;  // rounds to an integer in the low bits
    const f32x16 n = shift - 12582912.0f;
    const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const i32x16 exponent = __builtin_convertvector(n, i32x16) << 23;
    const f32x16 result = (f32x16)((i32x16)p + exponent);
    return x < -87.0f ? f32x16{} : result;
}

// One row's attention over keys [begin, end) of one KV head, for the `group` query heads that share it.
struct Partial {
    float most[MAX_GROUP];   // largest score
    float total[MAX_GROUP];  // sum of e^(score - most)
};

template <typename T, int VECTORS>
void attend(const T* query, const T* cache, const int64_t* table, int64_t begin, int64_t end, int64_t kv_head,
            int64_t num_kv_heads, int64_t block_size, int group, float scale, Partial& partial, float* sums) {
    constexpr int DIM = VECTORS * LANES;
    f32x16 q[MAX_GROUP][VECTORS];
    f32x16 acc[MAX_GROUP][VECTORS];
    for (int g = 0; g < group; g++) {
        partial.most[g] = LOWEST;
        partial.total[g] = 0;
        for (int d = 0; d < VECTORS; d++) {
            q[g][d] = load(query + g * DIM + d * LANES) * scale;
            acc[g][d] = f32x16{};
        }
    }
    for (int64_t at = begin; at < end;) {
        // Up to 16 keys that lie in one block.
        const int64_t offset = at % block_size;
        int count = LANES;
        if (count > block_size - offset) count = block_size - offset;
        if (count > end - at) count = end - at;
        const T* block = cache + (table[at / block_size] * 2 * num_kv_heads + kv_head) * block_size * DIM;
        const T* keys = block + offset * DIM;
        const T* values = keys + num_kv_heads * block_size * DIM;
        if (at + count < end && offset + count == block_size) {
            // The next block lies anywhere: ask for it while this one is computed.
            const char* next = reinterpret_cast<const char*>(
                cache + (table[at / block_size + 1] * 2 * num_kv_heads + kv_head) * block_size * DIM);
            const int64_t run = block_size * DIM * sizeof(T);
            for (int64_t byte = 0; byte < run; byte += 64) {
                __builtin_prefetch(next + byte);
                __builtin_prefetch(next + num_kv_heads * run + byte);
            }
        }
        f32x16 scores[MAX_GROUP];
        for (int g = 0; g < group; g++) scores[g] = f32x16{} + LOWEST;
        for (int t = 0; t < count; t++) {
            f32x16 key[VECTORS];
            for (int d = 0; d < VECTORS; d++) key[d] = load(keys + t * DIM + d * LANES);
            for (int g = 0; g < group; g++) {
                f32x16 product = q[g][0] * key[0];
                for (int d = 1; d < VECTORS; d++) product += q[g][d] * key[d];
                scores[g][t] = sum(product);
            }
        }
        for (int g = 0; g < group; g++) {
            const float most = largest(scores[g]);
            if (!(most <= partial.most[g])) {  // also NaN, which then spreads as it should
                const float rescale = exp_negative(f32x16{} + (partial.most[g] - most))[0];
                partial.total[g] *= rescale;
                for (int d = 0; d < VECTORS; d++) acc[g][d] *= rescale;
                partial.most[g] = most;
            }
            scores[g] = exp_negative(scores[g] - partial.most[g]);
            partial.total[g] += sum(scores[g]);
        }
        f32x16 wide[LANES][VECTORS];
        for (int t = 0; t < count; t++)
            for (int d = 0; d < VECTORS; d++) wide[t][d] = load(values + t * DIM + d * LANES);
        for (int g = 0; g < group; g++) {
            f32x16 own[VECTORS];
            for (int d = 0; d < VECTORS; d++) own[d] = acc[g][d];
            for (int t = 0; t < count; t++)
                for (int d = 0; d < VECTORS; d++) own[d] += scores[g][t] * wide[t][d];
            for (int d = 0; d < VECTORS; d++) acc[g][d] = own[d];
        }
        at += count;
    }
    for (int g = 0; g < group; g++)
        for (int d = 0; d < VECTORS; d++) store(sums + g * DIM + d * LANES, acc[g][d]);
}

struct Decode {
    const void* query;
    void* out;
    const void* cache;
    const int64_t* tokens;  // where each row's query stands in the batch
    const int64_t* tables;
    const int64_t* begins;  // first key that each row sees
    const int64_t* ends;
    int64_t num_rows, query_stride, table_stride, num_heads, num_kv_heads, block_size;
    float scale;
};

template <typename T, int VECTORS>
void decode(const Decode& step) {
    constexpr int DIM = VECTORS * LANES;
    const int group = step.num_heads / step.num_kv_heads;
    const auto* query = static_cast<const T*>(step.query);
    auto* out = static_cast<T*>(step.out);
    const auto* cache = static_cast<const T*>(step.cache);
    int64_t longest = 0, work = 0;
    for (int64_t row = 0; row < step.num_rows; row++) {
        const int64_t length = step.ends[row] - step.begins[row];
        longest = length > longest ? length : longest;
        work += length * step.num_heads;
    }
    const int64_t splits = (longest + SPLIT_TOKENS - 1) / SPLIT_TOKENS;
    const int64_t items = step.num_rows * step.num_kv_heads * splits;
    auto* partials = new Partial[items];
    auto* sums = new float[items * group * DIM];
#pragma omp parallel for schedule(dynamic) if (work > 512)
    for (int64_t item = 0; item < items; item++) {
        const int64_t row = item / splits / step.num_kv_heads, kv_head = item / splits % step.num_kv_heads;
        const int64_t begin = step.begins[row] + item % splits * SPLIT_TOKENS;
        const int64_t end = begin + SPLIT_TOKENS < step.ends[row] ? begin + SPLIT_TOKENS : step.ends[row];
        const T* heads = query + step.tokens[row] * step.query_stride + kv_head * group * DIM;
        attend<T, VECTORS>(heads, cache, step.tables + row * step.table_stride, begin, end, kv_head,
                           step.num_kv_heads, step.block_size, group, step.scale, partials[item],
                           sums + item * group * DIM);
    }
    for (int64_t pair = 0; pair < step.num_rows * step.num_kv_heads; pair++) {
        const int64_t row = pair / step.num_kv_heads, kv_head = pair % step.num_kv_heads;
        T* heads = out + (step.tokens[row] * step.num_heads + kv_head * group) * DIM;
        for (int g = 0; g < group; g++) {
            float most = LOWEST, total = 0;
            for (int64_t s = 0; s < splits; s++) {
                const float own = partials[pair * splits + s].most[g];
                most = own <= most ? most : own;
            }
            f32x16 acc[VECTORS] = {};
            for (int64_t s = 0; s < splits; s++) {
                const Partial& partial = partials[pair * splits + s];
                const float weight = exp_negative(f32x16{} + (partial.most[g] - most))[0];
                total += partial.total[g] * weight;
                for (int d = 0; d < VECTORS; d++)
                    acc[d] += weight * load(sums + ((pair * splits + s) * group + g) * DIM + d * LANES);
            }
            for (int d = 0; d < VECTORS; d++) store(heads + g * DIM + d * LANES, acc[d] / total);
        }
    }
    delete[] partials;
    delete[] sums;
}

template <typename T>
int decode_any(const Decode& step, int64_t head_dim) {
    switch (head_dim) {
        case 16: decode<T, 1>(step); return 0;
        case 32: decode<T, 2>(step); return 0;
        case 64: decode<T, 4>(step); return 0;
        case 80: decode<T, 5>(step); return 0;
        case 96: decode<T, 6>(step); return 0;
        case 128: decode<T, 8>(step); return 0;
        case 256: decode<T, 16>(step); return 0;
        default: return 1;
    }
}

template <typename T>
void rms_norm(T* residual, const T* delta, const T* weight, T* out, int64_t num_rows, int64_t size, float eps) {
#pragma omp parallel for if (num_rows * size > 1 << 16)
    for (int64_t row = 0; row < num_rows; row++) {
        T* x = residual + row * size;
        f32x16 squares = {};
        for (int64_t i = 0; i < size; i += LANES) {
            f32x16 value = load(x + i);
            if (delta != nullptr) {
                store(x + i, value + load(delta + row * size + i));
                value = load(x + i);  // what is stored is what is normalised
            }
            squares += value * value;
        }
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES) store(out + row * size + i, load(x + i) * scale * load(weight + i));
    }
}

}  // namespace

extern "C" {

// Copies the keys and values of T tokens to their slots. element_size: bytes; strides: elements between tokens.
void octavo_write_kv(const char* keys, const char* values, char* cache, const int64_t* slots, int64_t num_tokens,
                     int64_t key_stride, int64_t value_stride, int64_t num_kv_heads, int64_t block_size,
                     int64_t head_dim, int64_t element_size) {
    const int64_t run = head_dim * element_size, block = num_kv_heads * block_size * run;
    for (int64_t token = 0; token < num_tokens; token++) {
        char* at = cache + slots[token] / block_size * 2 * block + slots[token] % block_size * run;
        for (int64_t head = 0; head < num_kv_heads; head++, at += block_size * run) {
            std::memcpy(at, keys + token * key_stride * element_size + head * run, run);
            std::memcpy(at + block, values + token * value_stride * element_size + head * run, run);
        }
    }
}

// Attention of one query a row over a paged cache [blocks, 2, KV heads, block_size, head_dim]. Returns 1, having done
// nothing, for a head_dim or a number of query heads for each KV head that is not served.
int octavo_paged_decode(const void* query, void* out, const void* cache, const int64_t* tokens, const int64_t* tables,
                        const int64_t* begins, const int64_t* ends, int64_t num_rows, int64_t query_stride,
                        int64_t table_stride, int64_t num_heads, int64_t num_kv_heads, int64_t block_size,
                        int64_t head_dim, int64_t element_size, float scale) {
    if (num_heads / num_kv_heads > MAX_GROUP) return 1;
    const Decode step = {query,    out,          cache,        tokens,    tables,       begins,     ends,
                         num_rows, query_stride, table_stride, num_heads, num_kv_heads, block_size, scale};
    return element_size == 2 ? decode_any<bf16>(step, head_dim) : decode_any<float>(step, head_dim);
}

// residual += delta (unless that is null); out = residual / rms(residual) * weight. size: a multiple of 16.
void octavo_rms_norm(void* residual, const void* delta, const void* weight, void* out, int64_t num_rows, int64_t size,
                     int64_t element_size, float eps) {
    if (element_size == 2)
        rms_norm(static_cast<bf16*>(residual), static_cast<const bf16*>(delta), static_cast<const bf16*>(weight),
                 static_cast<bf16*>(out), num_rows, size, eps);
    else
        rms_norm(static_cast<float*>(residual), static_cast<const float*>(delta), static_cast<const float*>(weight),
                 static_cast<float*>(out), num_rows, size, eps);
}
}
