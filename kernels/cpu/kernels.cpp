// Products of a few or many tokens with bf16, fp16 or fp32 weights on a CPU, for each kind of processor.
//
// One library holds all kinds; the caller asks `was_processor` what this one has and passes the kind it wants:
//
//   0 plain     loops over vectors of four, which any compiler turns into what the target has (NEON, SSE)
//   1 avx2      AVX2, FMA, F16C
//   2 avx512    AVX-512 F, BW, VL, DQ
//   3 avx512bf16, 4 amx    the same, and pairs of bf16 multiplied at once in `was_product`
//
// The code of all kinds is body.inc, which is included once for each with the few functions that differ.

#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define WAS_X86 1
#endif
#if defined(__linux__) && defined(WAS_X86)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef WAS_SOURCE
#define WAS_SOURCE ""
#endif

extern "C" int omp_get_num_threads();
extern "C" int omp_get_thread_num();

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")  // for loops over registers

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
struct int4 { uint8_t byte; };  // two codes

// One value; NaN stays NaN, everything else rounds to nearest, ties to even.
INLINE float to_float(float value) { return value; }
INLINE float to_float(int8_t value) { return value; }

INLINE float to_float(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

INLINE float to_float(fp16 value) {
    // The exponent is moved by a product, which is right for subnormal numbers too.
    uint32_t bits = (value.bits & 0x7fffu) << 13;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    result *= 0x1p112f;
    std::memcpy(&bits, &result, sizeof result);
    if ((value.bits & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
    bits |= static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

INLINE void from_float(float* target, float value) { *target = value; }

INLINE void from_float(bf16* target, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    target->bits = nan ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE void from_float(fp16* target, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    uint16_t result;
    if (bits > 0x7f800000u) {
        result = 0x7e00u;
    } else if (bits >= 0x477ff000u) {  // 65520 and more round to infinity
        result = 0x7c00u;
    } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 lets the hardware round
        float magnitude;
        std::memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, sizeof bits);
        result = static_cast<uint16_t>(bits - 0x3f000000u);
    } else {
        result = static_cast<uint16_t>((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13);
    }
    target->bits = sign | result;
}

// Memory of one thread that is used again by its next call.
template <int SLOT>
static void* scratch(size_t bytes) {
    struct Buffer {
        void* memory = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(memory); }
    };
    static thread_local Buffer buffer;
    if (buffer.size < bytes) {
        std::free(buffer.memory);
        buffer.size = (bytes + 4095) / 4096 * 4096;
        buffer.memory = std::aligned_alloc(4096, buffer.size);
        if (!buffer.memory) std::abort();
    }
    return buffer.memory;
}

// Quantised weights of G Linears, by rows as kernels/quantized/rows.py has them.
struct Codes {
    const float* const* scales;         // G times [n_g] of int8, [k] of int4
    const uint8_t* const* groups;       // G times [k, n_g / group, 2] of int4
    const int64_t* group;               // G outputs of a group
};

// What one call of a sparse product holds: G Linears that share x [tokens, k]; W holds the weights, T everything else.
template <class T, class W>
struct Gather {
    const T* x;
    const W* const* weights;            // G times [k, n_g], rows contiguous
    const T* const* biases;             // G times [n_g] or null
    const float* const* thresholds;     // G times [k], or null: all channels are kept
    const int64_t* n;
    T* y;                               // [tokens, sum n_g]
    int64_t tokens, k, segments, threads;
    Codes codes;                        // of int8 and int4
    bool dots;                          // the processor multiplies bytes four at a time (VNNI)
    float* sums;                        // of the Linears in parts: [PARTS, room of tokens, room of their n]
};

// A Linear with short rows is shared among threads by its kept rows and not by its columns: pieces of rows are read at
// half the rate of rows that follow one another. Its sums are taken in so many parts of the kept rows, whatever the
// number of threads, and added in their order.
constexpr int64_t PARTS = 4;
constexpr int64_t SHORT = 4096;  // most bytes, and columns, of a short row

INLINE int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

// Room for the sums of so many tokens, which are multiplied by one, four or eight.
INLINE int64_t room_of(int64_t tokens) { return tokens == 1 ? 1 : tokens <= 4 ? 4 : (tokens + 7) / 8 * 8; }

template <class W>
INLINE bool in_parts(int64_t n) {
    return n <= SHORT && n * static_cast<int64_t>(sizeof(W)) / (std::is_same<W, int4>::value ? 2 : 1) <= SHORT;
}

// Asks for the rows of the next step, line by line in the order in which they lie, for the hardware sees only runs coming.
struct Ahead {
    const int8_t* const* rows;
    const int8_t* const* end;
    int64_t bytes;  // of a row
    const int8_t *at, *last;  // the next line and the last byte, of the row before `rows`
    int due = 0;

    Ahead(const int8_t* const* rows, int64_t count, int64_t bytes) : rows(rows), end(rows + count), bytes(bytes), at(nullptr), last(nullptr) {}

    // 1/256 of the lines to ask for in each of so many turns: evenly, for the processor waits when too many are asked for.
    int each(int64_t turns) const {
        const bool aligned = bytes % 64 == 0 && (rows == end || reinterpret_cast<uintptr_t>(*rows) % 64 == 0);
        return static_cast<int>(((end - rows) * (bytes / 64 + (aligned ? 0 : 2)) * 256 + turns - 1) / turns);
    }

    __attribute__((always_inline)) inline void fetch(int lines) {
        due += lines;
        const int count = due >> 8;
        due &= 255;
        for (int i = 0; i < count; ++i) {
            if (at >= last) {
                if (rows >= end) return;
                at = *rows++;
                last = at + bytes;
                at -= reinterpret_cast<uintptr_t>(at) % 64;
            }
            __builtin_prefetch(at, 0, 2);
            at += 64;
        }
    }
};

// y [m, n] = x [m, k] weight + bias [n]. `weight` is [k, n] with contiguous rows.
template <class T>
struct Product {
    const T* x;
    const T* weight;
    const T* bias;
    T* y;
    int64_t m, k, n, threads;
};

// A recorded step: instructions that a team of threads carries out in order (kernels/cpu/program.py writes them).

// The numbers of operations and dtypes are those of program.py.
enum Operation : int64_t {
    COPY, NEG, ABS, RELU, SQUARE, CUBE, SQRT, RSQRT, RECIPROCAL, EXP, SIGMOID, SILU, TANH, GELU, GELU_TANH, SIN, COS, NOT,
    ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, LT, LE, GT, GE, EQ, NE, AND, OR, WHERE,
    SUM, MEAN, AMAX, SOFTMAX, LAYER_NORM, INDEX, SCATTER, MATRICES, ATTENTION, ALL_ROWS, GATHER, GATHER_INT8, GATHER_INT4,
    ADD_PARTS, EXPECT
};
enum Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16, BOOL, INT8, INT32, INT64, FLOAT64 };

// A tensor; strides are in elements.
struct Operand {
    char* data;
    int64_t dtype;
    int64_t strides[5];

    int64_t width() const { return dtype >= INT64 ? 8 : dtype == FLOAT32 || dtype == INT32 ? 4 : dtype >= BOOL ? 1 : 2; }

    double get(const char* base, int64_t element) const {
        switch (dtype) {
            case FLOAT32: return reinterpret_cast<const float*>(base)[element];
            case BFLOAT16: return to_float(reinterpret_cast<const bf16*>(base)[element]);
            case FLOAT16: return to_float(reinterpret_cast<const fp16*>(base)[element]);
            case INT32: return reinterpret_cast<const int32_t*>(base)[element];
            case INT64: return static_cast<double>(reinterpret_cast<const int64_t*>(base)[element]);
            case FLOAT64: return reinterpret_cast<const double*>(base)[element];
            default: return reinterpret_cast<const int8_t*>(base)[element];
        }
    }

    void set(char* base, int64_t element, double value) const {
        switch (dtype) {
            case FLOAT32: reinterpret_cast<float*>(base)[element] = static_cast<float>(value); return;
            case BFLOAT16: from_float(reinterpret_cast<bf16*>(base) + element, static_cast<float>(value)); return;
            case FLOAT16: from_float(reinterpret_cast<fp16*>(base) + element, static_cast<float>(value)); return;
            case BOOL: base[element] = value != 0; return;
            case INT8: base[element] = static_cast<int8_t>(value); return;
            case INT32: reinterpret_cast<int32_t*>(base)[element] = static_cast<int32_t>(value); return;
            case INT64: reinterpret_cast<int64_t*>(base)[element] = static_cast<int64_t>(value); return;
            default: reinterpret_cast<double*>(base)[element] = value;
        }
    }
};

// Of a Linear.
struct Weight {
    const void* data;
    const void* bias;
    const float* threshold;
    const float* scales;     // of int8 and int4, as in `Codes`
    const uint8_t* groups;
    int64_t group;
};

struct Instruction {
    int64_t op, inputs, dims;
    int64_t waits;           // for all that comes before
    int64_t alone;           // one thread does it
    int64_t exact;           // in doubles, because integers take part
    int64_t sizes[5];
    Operand out, in[4];
    double number;
    int64_t integers[2];
    int64_t before, columns; // of a Linear: outputs of those with which it shares the threads, before it and in all
    Weight weight;
};

// Threads that wait for each other many times in a token, so they look for each other before they sleep.
struct Team {
    alignas(64) int64_t arrived;
    alignas(64) int64_t phase;
    int64_t failed;

    void wait(int64_t threads) {
        const int64_t now = __atomic_load_n(&phase, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == threads) {
            __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&phase, now + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int64_t looks = 0; __atomic_load_n(&phase, __ATOMIC_ACQUIRE) == now; ++looks) {
#ifdef WAS_X86
            _mm_pause();
#endif
            if (looks > 4000) sched_yield();  // somebody else needs the processor
        }
    }
};

// This thread's part of `count` columns, in multiples of 32 columns, a cache line of bf16.
INLINE void share(int64_t count, int64_t threads, int64_t thread, int64_t* begin, int64_t* end) {
    const int64_t blocks = (count + 31) / 32;
    *begin = std::min(count, blocks * thread / threads * 32);
    *end = std::min(count, blocks * (thread + 1) / threads * 32);
}

// ---------------------------------------------------------------------------------------------------------- plain

namespace plain {
constexpr int L = 4;
typedef float vf __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(8)));

INLINE vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
INLINE vf load(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
INLINE vf load(const fp16* p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
INLINE vf load(const int8_t* p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
template <class T>
INLINE void store(T* p, vf v) { for (int i = 0; i < L; ++i) from_float(p + i, v[i]); }
INLINE vf all(float value) { return vf{value, value, value, value}; }
INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
INLINE float sum(vf v) { return (v[0] + v[1]) + (v[2] + v[3]); }
INLINE int32_t keep(vf v, vf t, int32_t j, int32_t count, int32_t* index, float* kept) {
    for (int i = 0; i < L; ++i) {
        index[count] = j + i;
        kept[count] = v[i];
        count += !((v[i] < 0 ? -v[i] : v[i]) <= t[i]);
    }
    return count;
}
// Of int4: vectors over blocks of columns, and the sums of LANES blocks. `words` has s and z of a row, `both` those of two
// rows, and `factors` two rows' factors from floats to which 1.5 * 2^23 was added: 16 bits each, of which 8 are stored.
typedef vu vi;
INLINE vi words(const uint16_t* p) { vh h; std::memcpy(&h, p, sizeof h); return __builtin_convertvector(h, vu); }
INLINE vf low_bytes(vi v) { return __builtin_convertvector(v & 255, vf); }
INLINE vi both(vi first, vi second) { return first | second << 16; }
INLINE vi bits(vf v) { return (vi)v; }
INLINE vf floats(vi v) { return (vf)v; }
INLINE vi most(vi a, vf v) { const vi b = bits(v) & 0x7fffffffu; return a > b ? a : b; }  // by magnitude, a NaN above all
INLINE vi factors(vf first, vf second) { return (bits(first) & 0xffffu) | bits(second) << 16; }
INLINE vi add_zeros(vi sums, vi f, vi steps) {  // sums + f z, both rows'
    for (int b = 0; b < L; ++b)
        sums[b] += static_cast<int16_t>(f[b] & 0xffff) * static_cast<int32_t>(steps[b] >> 8 & 255) +
                   static_cast<int16_t>(f[b] >> 16) * static_cast<int32_t>(steps[b] >> 24);
    return sums;
}
INLINE vf whole(vi v) { vf f; for (int b = 0; b < L; ++b) f[b] = static_cast<float>(static_cast<int32_t>(v[b])); return f; }
INLINE void store_factors(uint16_t* to, vi f) {
    for (int b = 0; b < L; ++b) to[b] = static_cast<uint16_t>((f[b] & 255) | (f[b] >> 8 & 0xff00));
}
constexpr int LANES = 1;
template <int PAIRS, bool>
INLINE void add_blocks(const int4* const* row, int64_t at, const uint16_t* factors, int64_t stride, const float* unit, int, float* sums) {
    int16_t parts[32] = {};
    for (int p = 0; p < PAIRS; ++p) {
        const int8_t first = static_cast<int8_t>(factors[p * stride] & 255), second = static_cast<int8_t>(factors[p * stride] >> 8);
        for (int i = 0; i < 16; ++i) {
            const uint8_t a = row[2 * p][at + i].byte, b = row[2 * p + 1][at + i].byte;
            parts[i] = static_cast<int16_t>(parts[i] + (a & 15) * first + (b & 15) * second);
            parts[16 + i] = static_cast<int16_t>(parts[16 + i] + (a >> 4) * first + (b >> 4) * second);
        }
    }
    for (int i = 0; i < 32; ++i) sums[i] += *unit * parts[i];
}
// sums[c] += unit * sum_r factors[r] row[r][at + c] for HEIGHT rows and up to WIDE columns, of which `columns` count; the
// sums have room for a multiple of 32.
constexpr int HEIGHT = 32, WIDE = 32, TURNS = 1;  // a thread asks for rows TURNS times in a call
INLINE void add_codes(const int8_t* const* row, Ahead& ahead, int64_t at, int64_t, const int16_t* factors, float unit, float* sums, bool, int lines) {
    int32_t parts[WIDE] = {};
    for (int r = 0; r < HEIGHT; ++r)
        for (int c = 0; c < WIDE; ++c) parts[c] += row[r][at + c] * factors[r];
    ahead.fetch(lines * TURNS);
    for (int c = 0; c < WIDE; ++c) sums[c] += unit * parts[c];
}
constexpr int MR = 4, NV = 2;   // tile of the product: rows, vectors of columns
#include "body.inc"
#include "program.inc"
}  // namespace plain

#ifdef WAS_X86
// ----------------------------------------------------------------------------------------------------------- avx2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
constexpr int L = 8;
typedef __m256 vf;

INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
INLINE vf load(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
INLINE vf load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE vf load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
INLINE void store(bf16* p, vf v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
INLINE void store(fp16* p, vf v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE vf all(float value) { return _mm256_set1_ps(value); }
INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float sum(vf v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE int32_t keep(vf v, vf t, int32_t j, int32_t count, int32_t* index, float* kept) {
    const vf magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
    uint32_t mask = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(magnitude, t, _CMP_NLE_UQ)));
    float values[L];
    _mm256_storeu_ps(values, v);
    for (; mask; mask &= mask - 1) {
        const int i = __builtin_ctz(mask);
        index[count] = j + i;
        kept[count++] = values[i];
    }
    return count;
}
typedef __m256i vi;
INLINE vi words(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE vf low_bytes(vi v) { return _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(255))); }
INLINE vi both(vi first, vi second) { return _mm256_or_si256(first, _mm256_slli_epi32(second, 16)); }
INLINE vi bits(vf v) { return _mm256_castps_si256(v); }
INLINE vf floats(vi v) { return _mm256_castsi256_ps(v); }
INLINE vi most(vi a, vf v) { return _mm256_max_epi32(a, _mm256_and_si256(bits(v), _mm256_set1_epi32(0x7fffffff))); }
INLINE vi factors(vf first, vf second) { return _mm256_blend_epi16(bits(first), _mm256_slli_epi32(bits(second), 16), 0xaa); }
INLINE vi add_zeros(vi sums, vi f, vi steps) { return _mm256_add_epi32(sums, _mm256_madd_epi16(f, _mm256_srli_epi16(steps, 8))); }
INLINE vf whole(vi v) { return _mm256_cvtepi32_ps(v); }
INLINE void store_factors(uint16_t* to, vi f) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(f, f), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes));
}
constexpr int LANES = 2;
template <int PAIRS, bool ALL_LANES>
INLINE void add_blocks(const int4* const* row, int64_t at, const uint16_t* factors, int64_t stride, const float* unit, int, float* sums) {
    const auto codes = [&](const int4* from) {
        const __m128i* p = reinterpret_cast<const __m128i*>(from + at);
        return ALL_LANES ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_zextsi128_si256(_mm_loadu_si128(p));
    };
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i spread = _mm256_set_epi16(0x302, 0x302, 0x302, 0x302, 0x302, 0x302, 0x302, 0x302,
                                            0x100, 0x100, 0x100, 0x100, 0x100, 0x100, 0x100, 0x100);
    __m256i parts[4];  // of the columns 0, 8, 16 and 24 of both blocks, eight each
    UNROLL
    for (int j = 0; j < 4; ++j) parts[j] = _mm256_setzero_si256();
    UNROLL
    for (int p = 0; p < PAIRS; ++p) {
        const __m256i a = codes(row[2 * p]), b = codes(row[2 * p + 1]);
        int32_t two;
        std::memcpy(&two, factors + p * stride, sizeof two);
        const __m256i factor = _mm256_shuffle_epi8(_mm256_set1_epi32(two), spread);
        const __m256i both[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
        UNROLL
        for (int j = 0; j < 2; ++j) {
            const __m256i first = _mm256_and_si256(both[j], low);
            const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both[j], 4), low);
            parts[j] = _mm256_add_epi16(parts[j], _mm256_maddubs_epi16(first, factor));
            parts[2 + j] = _mm256_add_epi16(parts[2 + j], _mm256_maddubs_epi16(second, factor));
        }
    }
    UNROLL
    for (int lane = 0; lane < (ALL_LANES ? 2 : 1); ++lane) {
        const vf scale = all(unit[lane]);
        UNROLL
        for (int j = 0; j < 4; ++j) {
            const __m128i half = lane ? _mm256_extracti128_si256(parts[j], 1) : _mm256_castsi256_si128(parts[j]);
            float* to = sums + lane * 32 + j * 8;
            store(to, fma(scale, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half)), load(to)));
        }
    }
}
constexpr int HEIGHT = 32, WIDE = 32, TURNS = 16;
INLINE void add_codes(const int8_t* const* row, Ahead& ahead, int64_t at, int64_t, const int16_t* factors, float unit, float* sums, bool, int lines) {
    __m256i parts[4];
    UNROLL
    for (int j = 0; j < 4; ++j) parts[j] = _mm256_setzero_si256();
    for (int p = 0; p < HEIGHT; p += 2) {
        int32_t pair;
        std::memcpy(&pair, factors + p, sizeof pair);
        ahead.fetch(lines);
        const __m256i factor = _mm256_set1_epi32(pair);
        UNROLL
        for (int h = 0; h < 2; ++h) {  // sixteen columns each
            const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row[p] + at + 16 * h)));
            const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row[p + 1] + at + 16 * h)));
            parts[2 * h] = _mm256_add_epi32(parts[2 * h], _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), factor));
            parts[2 * h + 1] = _mm256_add_epi32(parts[2 * h + 1], _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), factor));
        }
    }
    UNROLL
    for (int h = 0; h < 2; ++h) {
        const __m256i both[2] = {_mm256_permute2x128_si256(parts[2 * h], parts[2 * h + 1], 0x20),
                                 _mm256_permute2x128_si256(parts[2 * h], parts[2 * h + 1], 0x31)};
        UNROLL
        for (int j = 0; j < 2; ++j) {
            float* to = sums + 16 * h + 8 * j;
            store(to, fma(all(unit), _mm256_cvtepi32_ps(both[j]), load(to)));
        }
    }
}
constexpr int MR = 6, NV = 2;
#include "body.inc"
#include "program.inc"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// --------------------------------------------------------------------------------------------------------- avx512

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
namespace avx512 {
constexpr int L = 16;
typedef __m512 vf;

INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
INLINE vf load(const bf16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
INLINE vf load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
INLINE vf load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
INLINE void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
INLINE void store(bf16* p, vf v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_srli_epi32(rounded, 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
INLINE void store(fp16* p, vf v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE vf all(float value) { return _mm512_set1_ps(value); }
INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum(vf v) { return _mm512_reduce_add_ps(v); }
INLINE int32_t keep(vf v, vf t, int32_t j, int32_t count, int32_t* index, float* kept) {
    const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_abs_ps(v), t, _CMP_NLE_UQ);
    const __m512i at = _mm512_add_epi32(
        _mm512_set1_epi32(j), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    // Compressed in the register: a store that compresses is slow on some processors.
    _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(mask, at));
    _mm512_storeu_ps(kept + count, _mm512_maskz_compress_ps(mask, v));
    return count + __builtin_popcount(mask);
}
typedef __m512i vi;
INLINE vi words(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
INLINE vf low_bytes(vi v) { return _mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32(255))); }
INLINE vi both(vi first, vi second) { return _mm512_or_si512(first, _mm512_slli_epi32(second, 16)); }
INLINE vi bits(vf v) { return _mm512_castps_si512(v); }
INLINE vf floats(vi v) { return _mm512_castsi512_ps(v); }
INLINE vi most(vi a, vf v) { return _mm512_max_epi32(a, _mm512_and_si512(bits(v), _mm512_set1_epi32(0x7fffffff))); }
INLINE vi factors(vf first, vf second) { return _mm512_mask_blend_epi16(0xaaaaaaaa, bits(first), _mm512_slli_epi32(bits(second), 16)); }
INLINE vi add_zeros(vi sums, vi f, vi steps) { return _mm512_add_epi32(sums, _mm512_madd_epi16(f, _mm512_srli_epi16(steps, 8))); }
INLINE vf whole(vi v) { return _mm512_cvtepi32_ps(v); }
INLINE void store_factors(uint16_t* to, vi f) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(f)); }
constexpr int LANES = 4;
template <int PAIRS, bool ALL_LANES>
INLINE void add_blocks(const int4* const* row, int64_t at, const uint16_t* factors, int64_t stride, const float* unit, int lanes, float* sums) {
    const __mmask16 mask = static_cast<__mmask16>((1u << (4 * lanes)) - 1);
    const auto codes = [&](const int4* from) { return ALL_LANES ? _mm512_loadu_si512(from + at) : _mm512_maskz_loadu_epi32(mask, from + at); };
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i spread = _mm512_set_epi64(0x0706070607060706, 0x0706070607060706, 0x0504050405040504, 0x0504050405040504,
                                            0x0302030203020302, 0x0302030203020302, 0x0100010001000100, 0x0100010001000100);
    __m512i parts[4];  // of the columns 0, 8, 16 and 24 of the four blocks, eight each
    UNROLL
    for (int j = 0; j < 4; ++j) parts[j] = _mm512_setzero_si512();
    UNROLL
    for (int p = 0; p < PAIRS; ++p) {
        const __m512i a = codes(row[2 * p]), b = codes(row[2 * p + 1]);
        int64_t four;
        std::memcpy(&four, factors + p * stride, sizeof four);
        const __m512i factor = _mm512_shuffle_epi8(_mm512_set1_epi64(four), spread);
        const __m512i both[2] = {_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b)};
        UNROLL
        for (int j = 0; j < 2; ++j) {
            const __m512i first = _mm512_and_si512(both[j], low);
            const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both[j], 4), low);
            parts[j] = _mm512_add_epi16(parts[j], _mm512_maddubs_epi16(first, factor));
            parts[2 + j] = _mm512_add_epi16(parts[2 + j], _mm512_maddubs_epi16(second, factor));
        }
    }
    UNROLL
    for (int lane = 0; lane < LANES; ++lane) {
        if (!ALL_LANES && lane >= lanes) break;
        const vf scale = all(unit[lane]);
        UNROLL
        for (int j = 0; j < 4; j += 2) {
            const __m256i halves = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_extracti32x4_epi32(parts[j], lane)),
                                                           _mm512_extracti32x4_epi32(parts[j + 1], lane), 1);
            float* to = sums + lane * 32 + j * 8;
            store(to, fma(scale, _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(halves)), load(to)));
        }
    }
}
constexpr int HEIGHT = 32, WIDE = 64, TURNS = 8;
INLINE void add_parts(const __m512i* parts, int count, float unit, float* sums) {
    UNROLL
    for (int j = 0; j < 4; ++j) {
        if (j >= count) break;
        store(sums + 16 * j, fma(all(unit), _mm512_cvtepi32_ps(parts[j]), load(sums + 16 * j)));
    }
}
// Four rows at a time: the bytes of a column stand together after two unpackings. A factor is 256 high + low, and a code
// is 128 less than the unsigned byte that the instruction takes.
__attribute__((target("avx512vnni"))) static void add_dots(const int8_t* const* row, Ahead& ahead, int64_t at, __mmask64 mask, int count,
                                                           const int16_t* factors, float unit, float* sums, int lines) {
    __m512i high[4], low[4];
    UNROLL
    for (int j = 0; j < 4; ++j) high[j] = low[j] = _mm512_setzero_si512();
    const __m512i sign = _mm512_set1_epi8(-128);
    int32_t total = 0;
    for (int p = 0; p < HEIGHT; p += 4) {
        __m512i w[4];
        ahead.fetch(lines);
        UNROLL
        for (int r = 0; r < 4; ++r) w[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, row[p + r] + at), sign);
        uint32_t lows = 0, highs = 0;
        UNROLL
        for (int r = 0; r < 4; ++r) {
            const int32_t factor = factors[p + r], last = static_cast<int8_t>(factor & 255);
            total += factor;
            lows |= static_cast<uint32_t>(last & 255) << (8 * r);
            highs |= static_cast<uint32_t>(((factor - last) >> 8) & 255) << (8 * r);
        }
        const __m512i a = _mm512_unpacklo_epi8(w[0], w[1]), b = _mm512_unpackhi_epi8(w[0], w[1]);
        const __m512i c = _mm512_unpacklo_epi8(w[2], w[3]), d = _mm512_unpackhi_epi8(w[2], w[3]);
        const __m512i four[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c), _mm512_unpacklo_epi16(b, d),
                                 _mm512_unpackhi_epi16(b, d)};
        UNROLL
        for (int j = 0; j < 4; ++j) {
            high[j] = _mm512_dpbusd_epi32(high[j], four[j], _mm512_set1_epi32(static_cast<int32_t>(highs)));
            low[j] = _mm512_dpbusd_epi32(low[j], four[j], _mm512_set1_epi32(static_cast<int32_t>(lows)));
        }
    }
    UNROLL
    for (int j = 0; j < 4; ++j) {
        low[j] = _mm512_add_epi32(_mm512_slli_epi32(high[j], 8), low[j]);
        low[j] = _mm512_sub_epi32(low[j], _mm512_set1_epi32(128 * total));
    }
    // Lane l of part j holds the columns 16 l + 4 j and three more.
    const __m512i a = _mm512_shuffle_i32x4(low[0], low[1], 0x44), b = _mm512_shuffle_i32x4(low[2], low[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(low[0], low[1], 0xee), d = _mm512_shuffle_i32x4(low[2], low[3], 0xee);
    const __m512i parts[4] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd),
                              _mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd)};
    add_parts(parts, count, unit, sums);
}
INLINE void add_codes(const int8_t* const* row, Ahead& ahead, int64_t at, int64_t columns, const int16_t* factors, float unit, float* sums,
                      bool dots, int lines) {
    const int halves = columns > 32 ? 2 : 1;
    if (dots) return add_dots(row, ahead, at, halves > 1 ? ~0ull : 0xffffffffull, 2 * halves, factors, unit, sums, lines);
    __m512i parts[4];
    UNROLL
    for (int j = 0; j < 4; ++j) parts[j] = _mm512_setzero_si512();
    for (int p = 0; p < HEIGHT; p += 2) {
        int32_t pair;
        std::memcpy(&pair, factors + p, sizeof pair);
        if (p % 4 == 0) ahead.fetch(lines);
        const __m512i factor = _mm512_set1_epi32(pair);
        UNROLL
        for (int h = 0; h < 2; ++h) {  // 32 columns each
            if (h >= halves) break;
            const __m512i a = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[p] + at + 32 * h)));
            const __m512i b = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[p + 1] + at + 32 * h)));
            parts[2 * h] = _mm512_add_epi32(parts[2 * h], _mm512_madd_epi16(_mm512_unpacklo_epi16(a, b), factor));
            parts[2 * h + 1] = _mm512_add_epi32(parts[2 * h + 1], _mm512_madd_epi16(_mm512_unpackhi_epi16(a, b), factor));
        }
    }
    const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    const __m512i ordered[4] = {_mm512_permutex2var_epi64(parts[0], first, parts[1]), _mm512_permutex2var_epi64(parts[0], second, parts[1]),
                                _mm512_permutex2var_epi64(parts[2], first, parts[3]), _mm512_permutex2var_epi64(parts[2], second, parts[3])};
    add_parts(ordered, 2 * halves, unit, sums);
}
constexpr int MR = 12, NV = 2;
#include "body.inc"
#include "program.inc"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// ---------------------------------------------------------------------------------------------- pairs of bf16: amx

#include "pairs.inc"
#endif  // WAS_X86

// ---------------------------------------------------------------------------------------------------------- entry

namespace {

enum Kind { PLAIN, AVX2, AVX512, AVX512_BF16, AMX };

template <class T, class W>
void gather(int64_t kind, const Gather<T, W>& call) {
#ifdef WAS_X86
    if (kind >= AVX512) return avx512::gather(call);
    if (kind == AVX2) return avx2::gather(call);
#endif
    plain::gather(call);
}

template <class T, class W>
void write_out(int64_t kind, const W* codes, const float* scales, const uint8_t* groups, int64_t group, int64_t k,
               int64_t n, T* out, int64_t threads) {
#ifdef WAS_X86
    if (kind >= AVX512) return avx512::write_out(codes, scales, groups, group, k, n, out, threads);
    if (kind == AVX2) return avx2::write_out(codes, scales, groups, group, k, n, out, threads);
#endif
    plain::write_out(codes, scales, groups, group, k, n, out, threads);
}

template <class T>
void rows(int64_t kind, const Product<T>& call) {
#ifdef WAS_X86
    if (kind >= AVX512) return avx512::rows(call);
    if (kind == AVX2) return avx2::rows(call);
#endif
    plain::rows(call);
}

template <class T>
void product(int64_t kind, const Product<T>& call) {
#ifdef WAS_X86
    if (kind >= AVX512) return avx512::product(call);
    if (kind == AVX2) return avx2::product(call);
#endif
    plain::product(call);
}

#ifdef WAS_X86
template <>
void product<bf16>(int64_t kind, const Product<bf16>& call) {
    if (kind >= AMX) return amx::product(call);
    if (kind == AVX512_BF16) return avx512bf16::product(call);
    if (kind == AVX512) return avx512::product(call);
    if (kind == AVX2) return avx2::product(call);
    plain::product(call);
}
#endif

template <template <class> class Call, class Visitor>
void with_dtype(int64_t dtype, Visitor visit) {
    if (dtype == 0) visit(Call<float>());
    if (dtype == 1) visit(Call<bf16>());
    if (dtype == 2) visit(Call<fp16>());
}

}  // namespace

extern "C" {

// Of which source this library is.
const char* was_source() { return WAS_SOURCE; }

// The highest kind that this processor and its system have.
int64_t was_processor() {
#ifdef WAS_X86
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())) return PLAIN;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
        return AVX2;
    if (!has_avx512_bf16()) return AVX512;
    return may_use_amx() ? AMX : AVX512_BF16;
#else
    return PLAIN;
#endif
}

// y = (x without its dropped channels) W^T + b for G Linears; dtype 0 fp32, 1 bf16, 2 fp16. `format` of the weights:
// 0 as x, 1 int8, 2 int4; the last three arguments are `Codes`, read for the latter two. See `Gather`.
void was_gather(int64_t kind, int64_t dtype, int64_t format, const void* x, const void* weights, const void* biases,
                const void* thresholds, const int64_t* n, void* y, int64_t tokens, int64_t k, int64_t segments,
                int64_t threads, const void* scales, const void* groups, const int64_t* group) {
    const Codes codes = {static_cast<const float* const*>(scales), static_cast<const uint8_t* const*>(groups), group};
    const auto run = [&](auto product) {
        using T = typename std::remove_const<typename std::remove_pointer<decltype(product.x)>::type>::type;
        const auto with = [&](auto weight) {
            using W = decltype(weight);
            const Gather<T, W> call = {
                static_cast<const T*>(x), static_cast<const W* const*>(weights), static_cast<const T* const*>(biases),
                static_cast<const float* const*>(thresholds), n, static_cast<T*>(y), tokens, k, segments, threads, codes,
                kind >= AVX512_BF16, nullptr};
            gather(kind, call);
        };
        if (format == 0) with(T());
        if (format == 1) with(int8_t());
        if (format == 2) with(int4());
    };
    with_dtype<Product>(dtype, run);
}

// The same for one Linear: `weight`, `bias` and `threshold` are its own.
void was_gather_one(int64_t kind, int64_t dtype, const void* x, const void* weight, const void* bias,
                    const void* threshold, int64_t n, void* y, int64_t tokens, int64_t k, int64_t threads) {
    was_gather(kind, dtype, 0, x, &weight, &bias, threshold ? &threshold : nullptr, &n, y, tokens, k, 1, threads,
               nullptr, nullptr, nullptr);
}

// Of how many parts the sums of a Linear of n outputs are; 0 where its columns are shared among threads.
int64_t was_parts(int64_t dtype, int64_t format, int64_t n) {
    const bool parts = format == 1 ? in_parts<int8_t>(n) : format == 2 ? in_parts<int4>(n) : dtype == 0 ? in_parts<float>(n) : in_parts<bf16>(n);
    return parts ? PARTS : 0;
}

// Carries out a recorded step; -1, or the position of an instruction whose value is not what the step was recorded with.
int64_t was_run(int64_t kind, const void* program, int64_t count, int64_t threads) {
    const Instruction* first = static_cast<const Instruction*>(program);
#ifdef WAS_X86
    if (kind >= AVX512) return avx512::run(first, count, threads, kind >= AVX512_BF16);
    if (kind == AVX2) return avx2::run(first, count, threads, false);
#endif
    return plain::run(first, count, threads, false);
}

// W^T [k, n] of quantised rows; `groups` null for int8.
void was_write_out(int64_t kind, int64_t dtype, const void* codes, const float* scales, const uint8_t* groups,
                   int64_t group, int64_t k, int64_t n, void* out, int64_t threads) {
    const auto run = [&](auto product) {
        using T = typename std::remove_const<typename std::remove_pointer<decltype(product.x)>::type>::type;
        T* to = static_cast<T*>(out);
        if (groups) write_out(kind, static_cast<const int4*>(codes), scales, groups, group, k, n, to, threads);
        else write_out(kind, static_cast<const int8_t*>(codes), scales, groups, group, k, n, to, threads);
    };
    with_dtype<Product>(dtype, run);
}

// y = x W^T + b for many tokens, W^T [k, n] with contiguous rows. See `Product`.
void was_product(int64_t kind, int64_t dtype, const void* x, const void* weight, const void* bias, void* y, int64_t m,
                 int64_t k, int64_t n, int64_t threads) {
    const auto run = [&](auto call) {
        using T = typename std::remove_const<typename std::remove_pointer<decltype(call.x)>::type>::type;
        call = {static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias),
                static_cast<T*>(y), m, k, n, threads};
        product(kind, call);
    };
    with_dtype<Product>(dtype, run);
}

// y = x W^T + b for a few tokens, W [n, k] with contiguous rows.
void was_rows(int64_t kind, int64_t dtype, const void* x, const void* weight, const void* bias, void* y, int64_t m,
              int64_t k, int64_t n, int64_t threads) {
    const auto run = [&](auto call) {
        using T = typename std::remove_const<typename std::remove_pointer<decltype(call.x)>::type>::type;
        call = {static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias),
                static_cast<T*>(y), m, k, n, threads};
        rows(kind, call);
    };
    with_dtype<Product>(dtype, run);
}
}
