// Sparse Linear on a CPU: y = (x with dropped channels zeroed) W^T + b, reading only the kept rows of W^T.
//
// For each of G Linears that share x [M, K]: W^T [K, N_i] row-contiguous, thresholds t_i [K] fp32, y [M, sum N_i].
// Channel j is kept unless |x_j| <= t_ij, so a NaN is kept. Sums are fp32, in the order of the channels whatever the
// number of threads; y is rounded once.
//
// Two things make it as fast as memory: rows of W^T lie far apart, so the hardware does not see the next one coming and
// it is prefetched by hand; and eight rows are summed at a time, so that the accumulators are read and written once
// for eight rows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int ROWS = 8;            // rows summed at a time
constexpr int64_t CHUNK = 4096;    // most columns per task: 16 KiB of accumulators
constexpr int64_t ALIGN = 32;      // columns; a multiple of a cache line of either type

struct bf16 {
    uint16_t bits;
};

inline float load(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline float load(float value) { return value; }

inline void store(bf16* target, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
    target->bits = nan ? 0x7fc0u : static_cast<uint16_t>(rounded >> 16);
}

inline void store(float* target, float value) { *target = value; }

// Kept channels of one token: their indices and values. Returns how many.
template <class T>
int32_t compact(const T* x, const float* threshold, int64_t k, int32_t* index, float* kept) {
    int32_t count = 0;
    for (int64_t j = 0; j < k; ++j) {
        const float value = load(x[j]);
        index[count] = static_cast<int32_t>(j);
        kept[count] = value;
        count += !((value < 0 ? -value : value) <= threshold[j]);
    }
    return count;
}

// sums[c] += sum_i kept[i] * weight[index[i], c] for the columns 0 <= c < width; weight has rows of n columns.
template <class T>
void gather(const T* __restrict weight, int64_t n, int64_t width, const int32_t* __restrict index,
            const float* __restrict kept, int32_t count, float* __restrict sums) {
    constexpr int64_t line = 64 / sizeof(T);
    int32_t i = 0;
    for (; i + ROWS <= count; i += ROWS) {
        const T* row[ROWS];
        const T* next[ROWS];
        float scale[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            row[r] = weight + index[i + r] * n;
            next[r] = weight + index[std::min(i + r + ROWS, count - 1)] * n;
            scale[r] = kept[i + r];
        }
        for (int64_t begin = 0; begin < width; begin += line) {
            for (int r = 0; r < ROWS; ++r) __builtin_prefetch(next[r] + begin, 0, 2);
            const int64_t end = std::min(begin + line, width);
            for (int64_t c = begin; c < end; ++c) {
                float sum = 0.0f;  // of these rows first: a long sum of short ones rounds less than one long sum
                for (int r = 0; r < ROWS; ++r) sum += scale[r] * load(row[r][c]);
                sums[c] += sum;
            }
        }
    }
    for (; i < count; ++i) {
        const T* row = weight + index[i] * n;
        for (int64_t c = 0; c < width; ++c) sums[c] += kept[i] * load(row[c]);
    }
}

struct Task {
    int64_t segment, begin, end;
};

// Columns of all segments in pieces of nearly equal width, at least one for each thread.
std::vector<Task> tasks_of(int64_t segments, const int64_t* n, int64_t threads) {
    std::vector<Task> tasks;
    for (int64_t g = 0; g < segments; ++g) {
        const int64_t share = (n[g] + threads - 1) / threads;
        const int64_t width = std::min(CHUNK, (share + ALIGN - 1) / ALIGN * ALIGN);
        for (int64_t begin = 0; begin < n[g]; begin += width)
            tasks.push_back({g, begin, std::min(begin + width, n[g])});
    }
    return tasks;
}

template <class T>
void sparse_linear(const T* x, const T* const* weights, const T* const* biases, const float* const* thresholds,
                   const int64_t* n, T* y, int64_t tokens, int64_t k, int64_t segments, int64_t threads) {
    std::vector<int32_t> index(segments * tokens * k);
    std::vector<float> kept(segments * tokens * k);
    std::vector<int32_t> counts(segments * tokens);
    std::vector<int64_t> offset(segments + 1, 0);
    for (int64_t g = 0; g < segments; ++g) offset[g + 1] = offset[g] + n[g];
    const std::vector<Task> tasks = tasks_of(segments, n, threads);

#pragma omp parallel num_threads(static_cast<int>(threads))
    {
#pragma omp for schedule(static)
        for (int64_t list = 0; list < segments * tokens; ++list)
            counts[list] = compact(x + list % tokens * k, thresholds[list / tokens], k, &index[list * k], &kept[list * k]);

#pragma omp for schedule(static)
        for (size_t t = 0; t < tasks.size(); ++t) {
            const auto [g, begin, end] = tasks[t];
            alignas(64) float sums[CHUNK];
            for (int64_t token = 0; token < tokens; ++token) {
                for (int64_t c = begin; c < end; ++c) sums[c - begin] = biases[g] ? load(biases[g][c]) : 0.0f;
                const int64_t list = g * tokens + token;
                gather(weights[g] + begin, n[g], end - begin, &index[list * k], &kept[list * k], counts[list], sums);
                T* out = y + token * offset[segments] + offset[g];
                for (int64_t c = begin; c < end; ++c) store(out + c, sums[c - begin]);
            }
        }
    }
}

}  // namespace

extern "C" {

void sparse_linear_bf16(const bf16* x, const bf16* const* weights, const bf16* const* biases,
                        const float* const* thresholds, const int64_t* n, bf16* y, int64_t tokens, int64_t k,
                        int64_t segments, int64_t threads) {
    sparse_linear(x, weights, biases, thresholds, n, y, tokens, k, segments, threads);
}

void sparse_linear_fp32(const float* x, const float* const* weights, const float* const* biases,
                        const float* const* thresholds, const int64_t* n, float* y, int64_t tokens, int64_t k,
                        int64_t segments, int64_t threads) {
    sparse_linear(x, weights, biases, thresholds, n, y, tokens, k, segments, threads);
}
}
