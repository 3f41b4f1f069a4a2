// Multiply activations with compressed weights, on processors with AVX2.
//
// OpenVINO's own kernel for AVX2 unpacks weights to float and multiplies in float. This one rounds the activations of
// each group to 8 bits, and multiplies bytes: four times as many for each instruction. It reads the weights as they are
// in the bundle, so nothing is packed, and the weights stay mapped.
//
// OpenVINO loads this library as an extension. `extension.py` builds the operation into a graph. The library has no
// link to OpenVINO or oneTBB: it finds both in the process, where `extension.py` has made their symbols visible.

#include <immintrin.h>
#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "openvino/core/extension.hpp"
#include "openvino/core/op_extension.hpp"
#include "openvino/op/op.hpp"

namespace {

constexpr int64_t ROWS = 48;  // rows of weights of a task
constexpr float LARGEST = 127;
constexpr int64_t TILE_BYTES = 16 * 1024;  // of activations, so that they stay in the first cache

// What the kernel knows of the weights. Sizes in numbers, not bytes.
struct Weights {
    const uint8_t* values;       // (rows, columns), packed
    const uint8_t* scales;       // (rows, groups), float16
    const uint8_t* zero_points;  // (rows, groups), packed as the values; null for signed values, which have none
    int64_t rows, columns;
    int64_t bits, group;  // `group` columns share a scale
};

inline float sum(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// Otherwise GCC multiplies first and adds later, which needs more registers than there are.
inline void keep_in_register(__m256i& v) { asm volatile("" : "+x"(v)); }

// What is at most LARGEST after rounding: the absolute value of each activation, or those of an even column and the next
// one together. SUM limits each, and the absolute values of half of the columns together, which are columns 0 to 3 of
// each 8 columns, and the others.
enum class Limit { EACH, PAIR, SUM };

constexpr int LARGEST_SUM = 32767 / 8;  // times a weight from -8 to 7, it fits into 16 bits

// Return the smallest scale of `columns` activations of one token, a multiple of 32. Rounding may add a half to each.
template <Limit limit>
float smallest_scale(const float* x, int64_t columns) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 largest = _mm256_setzero_ps(), total = _mm256_setzero_ps(), not_finite = _mm256_setzero_ps();
    for (int64_t i = 0; i < columns; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i), absolute = _mm256_and_ps(v, no_sign);
        largest = _mm256_max_ps(largest, limit == Limit::PAIR ? _mm256_hadd_ps(absolute, absolute) : absolute);
        total = _mm256_add_ps(total, absolute);
        not_finite = _mm256_fmadd_ps(v, _mm256_setzero_ps(), not_finite);  // NaN if one is not finite
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, largest);
    float scale = *std::max_element(lanes, lanes + 8) / (limit == Limit::PAIR ? LARGEST - 1 : LARGEST);
    if (limit == Limit::SUM) {
        _mm256_store_ps(lanes, total);
        const float low = lanes[0] + lanes[1] + lanes[2] + lanes[3], high = lanes[4] + lanes[5] + lanes[6] + lanes[7];
        scale = std::max(scale, std::max(low, high) / (LARGEST_SUM - columns / 4));
    }
    return scale + sum(not_finite);
}

// Round `columns` activations of one token, a multiple of 32.
template <Limit limit>
void quantize(const float* x, int64_t columns, int8_t* values, float* scale, float* scaled_sum) {
    *scale = smallest_scale<limit>(x, columns);
    const __m256 inverse = _mm256_set1_ps(*scale > 0 ? 1 / *scale : 0.0f);
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < columns; i += 32) {
        __m256i v[4];
        for (int j = 0; j < 4; ++j) {
            v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), inverse));
            total = _mm256_add_epi32(total, v[j]);
        }
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + i), _mm256_permutevar8x32_epi32(bytes, order));
    }
    *scaled_sum = *scale * sum(_mm256_cvtepi32_ps(total));
}

// Scale, and scale times zero point, of each step of the rows of a task.
struct Scales {
    std::vector<float> scales, shifts;
};

float half(const uint8_t* p) {
    uint16_t bits;
    std::copy(p, p + 2, reinterpret_cast<uint8_t*>(&bits));
    return _cvtsh_ss(bits);
}

// Four bytes are eight zero points, the first in the low half
__m256 eight_zero_points(const uint8_t* p) {
    int32_t bytes;
    std::copy(p, p + 4, reinterpret_cast<uint8_t*>(&bytes));
    const __m128i low = _mm_and_si128(_mm_cvtsi32_si128(bytes), _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_cvtsi32_si128(bytes >> 4), _mm_set1_epi8(15));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)));
}

// `less` is what unsigned values have less when they are multiplied. Signed values become unsigned ones before.
Scales scales_of(const Weights& w, int64_t first, int64_t last, int64_t step, float less) {
    const float zero = (w.bits == 4 ? 8 : 128) - less;
    const int64_t steps = w.columns / step, groups = w.columns / w.group, repeats = w.group / step;
    Scales result;
    result.scales.resize((last - first) * steps);
    result.shifts.resize((last - first) * steps);
    float *scales = result.scales.data(), *shifts = result.shifts.data();
    for (int64_t row = first; row < last; ++row) {
        int64_t group = 0;
        if (w.bits == 4 && repeats == 1 && row * groups % 2 == 0) {
            for (; group + 8 <= groups; group += 8, scales += 8, shifts += 8) {
                const int64_t at = row * groups + group;
                const __m256 scale =
                    _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.scales + 2 * at)));
                __m256 zeros = _mm256_set1_ps(zero);
                if (w.zero_points)
                    zeros = _mm256_sub_ps(eight_zero_points(w.zero_points + at / 2), _mm256_set1_ps(less));
                _mm256_storeu_ps(scales, scale);
                _mm256_storeu_ps(shifts, _mm256_mul_ps(scale, zeros));
            }
        }
        for (; group < groups; ++group) {
            const int64_t at = row * groups + group;
            float of_group = zero;
            if (w.zero_points)
                of_group = (w.bits == 4 ? w.zero_points[at / 2] >> (at % 2 * 4) & 15 : w.zero_points[at]) - less;
            const float scale = half(w.scales + 2 * at);
            for (int64_t i = 0; i < repeats; ++i) {
                *scales++ = scale;
                *shifts++ = scale * of_group;
            }
        }
    }
    return result;
}

// ---- Few tokens. Weights are unpacked in registers, for each row, and multiplied with up to TILE tokens. ----

constexpr int64_t TILE = 4;

// Activations in 8 bits. Tokens are in tiles: for each tile, for each step, for each token of the tile, `step` values.
struct Activations {
    std::vector<int8_t> values;
    std::vector<float> scales;  // (tiles, steps, TILE)
    std::vector<float> sums;    // (tiles, steps, TILE): the sum of the values, with their scale
};

template <class Step>
Activations quantized(const float* x, int64_t tokens, const Weights& weights) {
    const int64_t tiles = (tokens + TILE - 1) / TILE, steps = weights.columns / Step::step;
    Activations a;
    a.values.resize(tokens * weights.columns);
    a.scales.resize(tiles * steps * TILE);
    a.sums.resize(tiles * steps * TILE);
    const auto one_token = [&](int64_t token) {
        const int64_t tile = token / TILE, in_tile = token % TILE, width = std::min(TILE, tokens - tile * TILE);
        int8_t rounded[Step::step];
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t at = (tile * steps + s) * TILE + in_tile;
            quantize<Limit::EACH>(x + token * weights.columns + s * Step::step, Step::step, rounded, &a.scales[at],
                                  &a.sums[at]);
            int8_t* values = a.values.data() + tile * TILE * weights.columns + (s * width + in_tile) * Step::step;
            for (int64_t i = 0; i < Step::step; ++i) values[Step::place(i)] = rounded[i];
        }
    };
    if (tokens == 1) {
        one_token(0);
    } else {
        tbb::parallel_for(tbb::blocked_range<int64_t>(0, tokens), [&](const auto& range) {
            for (int64_t token = range.begin(); token < range.end(); ++token) one_token(token);
        });
    }
    return a;
}

// A step: what is known of the columns of a row of weights that are multiplied together. `multiply` adds their products
// with the activations of `tokens` tokens to the sums of each token, scaled.

// 4 bits, in units of 64 columns: 32 bytes, whose low halves are the even columns. The sum of 128 columns, which are
// eight products of 15 * 127 in each 16-bit lane, is below 2^15.
template <int units>
struct FourBits {
    static constexpr int bits = 4;
    static constexpr int64_t step = units * 64, bytes = step / 2;

    static int64_t place(int64_t i) { return i / 64 * 64 + i % 2 * 32 + i % 64 / 2; }

    template <int tokens>
    static inline void multiply(const uint8_t* w, bool is_signed, const int8_t* x, __m256 scale, const float* x_scales,
                                __m256 (&sums)[tokens]) {
        const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
        const __m256i flip = _mm256_set1_epi8(is_signed ? static_cast<char>(0x88) : 0);
        __m256i low[units], high[units];
        for (int u = 0; u < units; ++u) {
            const __m256i packed =
                _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + u), flip);
            low[u] = _mm256_and_si256(packed, mask);
            high[u] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
        }
#pragma GCC unroll 4
        for (int token = 0; token < tokens; ++token) {
            const __m256i* values = reinterpret_cast<const __m256i*>(x + token * step);
            __m256i s = _mm256_setzero_si256();
            for (int u = 0; u < units; ++u) {
                s = _mm256_add_epi16(s, _mm256_maddubs_epi16(low[u], _mm256_loadu_si256(values + 2 * u)));
                s = _mm256_add_epi16(s, _mm256_maddubs_epi16(high[u], _mm256_loadu_si256(values + 2 * u + 1)));
            }
            const __m256 both = _mm256_mul_ps(scale, _mm256_broadcast_ss(x_scales + token));
            keep_in_register(s);
            sums[token] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(s, ones)), both, sums[token]);
        }
    }
};

// 4 bits, 32 columns: for groups that are not a multiple of 64
struct FourBitsNarrow {
    static constexpr int bits = 4;
    static constexpr int64_t step = 32, bytes = 16;

    static int64_t place(int64_t i) { return i % 2 * 16 + i / 2; }

    template <int tokens>
    static inline void multiply(const uint8_t* w, bool is_signed, const int8_t* x, __m256 scale, const float* x_scales,
                                __m256 (&sums)[tokens]) {
        const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
        const __m128i flip = _mm_set1_epi8(is_signed ? static_cast<char>(0x88) : 0);
        const __m128i packed = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)), flip);
        const __m256i values = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), mask);
#pragma GCC unroll 4
        for (int token = 0; token < tokens; ++token) {
            const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + token * step));
            const __m256i s = _mm256_madd_epi16(_mm256_maddubs_epi16(values, v), ones);
            const __m256 both = _mm256_mul_ps(scale, _mm256_broadcast_ss(x_scales + token));
            sums[token] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), both, sums[token]);
        }
    }
};

// 8 bits. The sign of a weight goes to the activation, because one side of the instruction is unsigned. Two products of
// 128 * 127 in each 16-bit lane are below 2^15.
template <int units>
struct EightBits {
    static constexpr int bits = 8;
    static constexpr int64_t step = units * 32, bytes = step;

    static int64_t place(int64_t i) { return i; }

    template <int tokens>
    static inline void multiply(const uint8_t* w, bool is_signed, const int8_t* x, __m256 scale, const float* x_scales,
                                __m256 (&sums)[tokens]) {
        const __m256i ones = _mm256_set1_epi16(1);
        const __m256i flip = _mm256_set1_epi8(is_signed ? 0 : static_cast<char>(0x80));
        __m256i s[tokens];
#pragma GCC unroll 4
        for (int token = 0; token < tokens; ++token) s[token] = _mm256_setzero_si256();
        for (int u = 0; u < units; ++u) {
            const __m256i values =
                _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + u), flip);
            const __m256i absolute = _mm256_abs_epi8(values);
#pragma GCC unroll 4
            for (int token = 0; token < tokens; ++token) {
                const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + token * step) + u);
                const __m256i pairs = _mm256_maddubs_epi16(absolute, _mm256_sign_epi8(v, values));
                s[token] = _mm256_add_epi32(s[token], _mm256_madd_epi16(pairs, ones));
                keep_in_register(s[token]);
            }
        }
#pragma GCC unroll 4
        for (int token = 0; token < tokens; ++token) {
            const __m256 both = _mm256_mul_ps(scale, _mm256_broadcast_ss(x_scales + token));
            sums[token] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[token]), both, sums[token]);
        }
    }
};

// Multiply rows [first, last) with one tile of tokens, and write or add the products of steps [from, to).
template <class Step, int tokens, bool is_signed>
void multiply_tile(const Weights& w, const Scales& scales, const Activations& a, int64_t tile,
                   int64_t first, int64_t last, int64_t from, int64_t to, float* y) {
    const int64_t steps = w.columns / Step::step;
    const int8_t* x = a.values.data() + tile * TILE * w.columns;
    const float* x_scales = a.scales.data() + tile * steps * TILE;
    const float* x_sums = a.sums.data() + tile * steps * TILE;
    for (int64_t row = first; row < last; ++row) {
        const uint8_t* values = w.values + row * steps * Step::bytes;
        const float* row_scales = scales.scales.data() + (row - first) * steps;
        const float* row_shifts = scales.shifts.data() + (row - first) * steps;
        __m256 sums[tokens];
        __m128 shift = _mm_setzero_ps();
        for (int token = 0; token < tokens; ++token) sums[token] = _mm256_setzero_ps();
        for (int64_t s = from; s < to; ++s) {
            Step::template multiply<tokens>(values + s * Step::bytes, is_signed, x + s * tokens * Step::step,
                                            _mm256_broadcast_ss(row_scales + s), x_scales + s * TILE, sums);
            if (!(is_signed && Step::bits == 8))
                shift = _mm_fmadd_ps(_mm_broadcast_ss(row_shifts + s), _mm_loadu_ps(x_sums + s * TILE), shift);
        }
        alignas(16) float shifts[TILE];
        _mm_store_ps(shifts, shift);
        for (int token = 0; token < tokens; ++token) {
            float* out = y + (tile * TILE + token) * w.rows + row;
            *out = (from ? *out : 0.0f) + sum(sums[token]) - shifts[token];
        }
    }
}

template <class Step>
using MultiplyTile = void (*)(const Weights&, const Scales&, const Activations&, int64_t, int64_t,
                              int64_t, int64_t, int64_t, float*);

// One function for each number of tokens in a tile
template <class Step, bool is_signed, int... tokens>
constexpr std::array<MultiplyTile<Step>, TILE> by_tokens(std::integer_sequence<int, tokens...>) {
    return {multiply_tile<Step, tokens + 1, is_signed>...};
}

template <class Step>
void multiply_few(const Weights& w, const float* x, int64_t tokens, float* y) {
    static constexpr auto of_signed = by_tokens<Step, true>(std::make_integer_sequence<int, TILE>());
    static constexpr auto of_unsigned = by_tokens<Step, false>(std::make_integer_sequence<int, TILE>());
    const auto& of = w.zero_points ? of_unsigned : of_signed;
    const auto a = quantized<Step>(x, tokens, w);
    const int64_t steps = w.columns / Step::step, tiles = (tokens + TILE - 1) / TILE;
    const int64_t tasks = (w.rows + ROWS - 1) / ROWS;
    tbb::parallel_for(tbb::blocked_range<int64_t>(0, tasks), [&](const tbb::blocked_range<int64_t>& range) {
        for (int64_t task = range.begin(); task < range.end(); ++task) {
            const int64_t first = task * ROWS, last = std::min(first + ROWS, w.rows);
            const Scales scales = scales_of(w, first, last, Step::step, Step::bits == 4 ? 0 : 128);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t width = std::min<int64_t>(TILE, tokens - tile * TILE);
                const int64_t step_bytes = width * Step::step;
                const int64_t at_once = std::max<int64_t>(TILE_BYTES / step_bytes, 1);
                for (int64_t from = 0; from < steps; from += at_once)
                    of[width - 1](w, scales, a, tile, first, last, from, std::min(from + at_once, steps), y);
            }
        }
    });
}

// ---- Many tokens. Weights are unpacked into memory once, and multiplied with eight tokens in each register. ----

constexpr int64_t MANY = 32;       // tokens from which this is faster
constexpr int64_t LANES = 8;       // tokens of a register, with 4 columns of each in 32 bits
constexpr int VECTORS = 2;         // registers of tokens in a tile
constexpr int64_t WIDTH = VECTORS * LANES;
constexpr int ROWS_AT_ONCE = 4;    // rows that share what is loaded of the activations
constexpr int64_t UNIT = 32;       // columns that are unpacked at once
constexpr int64_t AT_ONCE = 1024;  // columns. Of a tile of tokens, they stay in the first cache
constexpr int64_t TOKENS = 512;    // whose sums stay in the second cache

// Weights are signed here, from -8 or -128, and products are added in 16 bits as far as the sum fits. But the instruction
// needs unsigned weights, with MORE added. What these add to a sum is taken away from it before: sums may overflow on the
// way, as long as the result fits.
template <int bits>
constexpr int MORE = bits == 4 ? 8 : 128;

// Of 4 bits, with Limit::SUM, the 64 products of a step fit. Of 8 bits, with Limit::PAIR, four products fit, and two with
// unsigned weights, which the instruction adds by itself.
template <int bits>
int64_t columns_of_sum(int64_t step) {
    return bits == 4 ? step : 8;
}

// Activations in 8 bits. Tokens are in tiles of WIDTH. The last tile has more tokens than there are: what is in them has
// no meaning, and is not used.
struct Tiles {
    std::unique_ptr<__m256i[]> values;   // (tiles, columns / 4, VECTORS), each of LANES tokens and 4 columns
    std::unique_ptr<__m256i[]> offsets;  // (tiles, columns / columns_of_sum, VECTORS), each of LANES tokens and 2 sums
    std::unique_ptr<__m256[]> scales;    // (tiles, steps, VECTORS), each of LANES tokens
    std::unique_ptr<__m256[]> sums;      // as the scales: the sum of the values, with their scale
};

// Put the even columns before the odd ones, as the low and high halves of bytes are unpacked.
inline __m256i evens_first(__m256i bytes) {
    const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                           0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, order), _MM_SHUFFLE(3, 1, 2, 0));
}

template <int bits>
Tiles tiled(const float* x, int64_t tokens, const Weights& w, int64_t step) {
    const int64_t tiles = (tokens + WIDTH - 1) / WIDTH, steps = w.columns / step, of_sum = columns_of_sum<bits>(step);
    Tiles t;  // not set to zero, which would take as long as the rest
    t.values.reset(new __m256i[tiles * w.columns / 4 * VECTORS]);
    t.offsets.reset(new __m256i[tiles * w.columns / of_sum * VECTORS]);
    t.scales.reset(new __m256[tiles * steps * VECTORS]);
    t.sums.reset(new __m256[tiles * steps * VECTORS]);
    const auto one_vector = [&](int64_t first) {
        const int64_t tile = first / WIDTH, vector = first % WIDTH / LANES, width = std::min(LANES, tokens - first);
        alignas(32) int8_t rounded[LANES][128] = {};
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t at = (tile * steps + s) * VECTORS + vector;
            alignas(32) float scales[LANES] = {}, sums[LANES] = {};
            for (int64_t lane = 0; lane < width; ++lane) {
                quantize<bits == 4 ? Limit::SUM : Limit::PAIR>(x + (first + lane) * w.columns + s * step, step,
                                                               rounded[lane], scales + lane, sums + lane);
                for (int64_t i = 0; i < step && bits == 4; i += UNIT) {
                    __m256i* unit = reinterpret_cast<__m256i*>(rounded[lane] + i);
                    *unit = evens_first(*unit);
                }
            }
            t.scales[at] = _mm256_load_ps(scales);
            t.sums[at] = _mm256_load_ps(sums);
            __m256i* values = &t.values[(tile * w.columns + s * step) / 4 * VECTORS + vector];
            __m256i* offsets = &t.offsets[(tile * w.columns + s * step) / of_sum * VECTORS + vector];
            for (int64_t from = 0; from < step; from += of_sum, offsets += VECTORS) {
                __m256i offset = _mm256_setzero_si256();
                for (int64_t i = from; i < from + of_sum; i += 4, values += VECTORS) {
                    for (int64_t lane = 0; lane < LANES; ++lane)
                        std::memcpy(reinterpret_cast<int8_t*>(values) + 4 * lane, rounded[lane] + i, 4);
                    offset = _mm256_sub_epi16(offset, _mm256_maddubs_epi16(_mm256_set1_epi8(1), *values));
                }
                *offsets = _mm256_mullo_epi16(offset, _mm256_set1_epi16(MORE<bits>));
            }
        }
    };
    tbb::parallel_for(tbb::blocked_range<int64_t>(0, (tokens + LANES - 1) / LANES), [&](const auto& range) {
        for (int64_t vector = range.begin(); vector < range.end(); ++vector) one_vector(vector * LANES);
    });
    return t;
}

// Unpack columns of a row to unsigned bytes.
template <int bits>
void unpack(const Weights& w, int64_t row, int64_t from, int64_t to, uint8_t* unpacked) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i flip = _mm256_set1_epi8(w.zero_points ? 0 : static_cast<char>(bits == 4 ? 0x88 : 0x80));
    const uint8_t* values = w.values + (row * w.columns + from) * bits / 8;
    const uint8_t* end = w.values + (row * w.columns + to) * bits / 8;
    const auto store = [&](__m256i v) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(unpacked), v);
        unpacked += UNIT;
    };
    for (; values + 32 <= end; values += 32) {
        const __m256i packed = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), flip);
        if (bits == 4) {
            const __m256i low = _mm256_and_si256(packed, mask);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            store(_mm256_permute2x128_si256(low, high, 0x20));
            store(_mm256_permute2x128_si256(low, high, 0x31));
        } else {
            store(packed);
        }
    }
    if (values < end) {  // one unit of 4 bits
        const __m128i packed = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)),
                                             _mm256_castsi256_si128(flip));
        store(_mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), mask));
    }
}

inline __m256i broadcast_32_bits(const uint8_t* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return _mm256_set1_epi32(bits);
}

// Multiply a step of `rows` rows of unpacked weights with the tokens of `vectors` registers.
template <int rows, int vectors>
inline void multiply_four_bits(const uint8_t* w, int64_t w_stride, const __m256i* x, const __m256i* offsets,
                               int64_t step, __m256i (&products)[rows][vectors]) {
    for (int row = 0; row < rows; ++row)
        for (int v = 0; v < vectors; ++v) products[row][v] = offsets[v];
    for (const uint8_t* end = w + step; w < end;) {
#pragma GCC unroll 8
        for (int i = 0; i < UNIT / 4; ++i, w += 4, x += VECTORS) {
#pragma GCC unroll 4
            for (int row = 0; row < rows; ++row) {
                const __m256i weights = broadcast_32_bits(w + row * w_stride);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) {
                    products[row][v] = _mm256_add_epi16(products[row][v], _mm256_maddubs_epi16(weights, x[v]));
                    keep_in_register(products[row][v]);
                }
            }
        }
    }
    for (int row = 0; row < rows; ++row)
        for (int v = 0; v < vectors; ++v)
            products[row][v] = _mm256_madd_epi16(products[row][v], _mm256_set1_epi16(1));
}

template <int rows, int vectors>
inline void multiply_eight_bits(const uint8_t* w, int64_t w_stride, const __m256i* x, const __m256i* offsets,
                                int64_t step, __m256i (&products)[rows][vectors]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int row = 0; row < rows; ++row)
        for (int v = 0; v < vectors; ++v) products[row][v] = _mm256_setzero_si256();
    for (const uint8_t* end = w + step; w < end;) {
#pragma GCC unroll 4
        for (int i = 0; i < UNIT / 8; ++i, w += 8, x += 2 * VECTORS, offsets += VECTORS) {
#pragma GCC unroll 4
            for (int row = 0; row < rows; ++row) {
                const __m256i first = broadcast_32_bits(w + row * w_stride);
                const __m256i second = broadcast_32_bits(w + row * w_stride + 4);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) {
                    __m256i sum = _mm256_add_epi16(offsets[v], _mm256_maddubs_epi16(first, x[v]));
                    keep_in_register(sum);
                    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(second, x[VECTORS + v]));
                    products[row][v] = _mm256_add_epi32(products[row][v], _mm256_madd_epi16(sum, ones));
                    keep_in_register(products[row][v]);
                }
            }
        }
    }
}

// Add the products of `rows` rows of unpacked weights with a tile to `sums` (rows, VECTORS).
template <int bits, int rows, int vectors>
void multiply_block(const uint8_t* w, int64_t w_stride, const float* scales, const float* shifts, int64_t scales_stride,
                    const __m256i* x, const __m256i* offsets, const __m256* x_scales, const __m256* x_sums,
                    int64_t steps, int64_t step, __m256* sums) {
    const auto multiply = bits == 4 ? multiply_four_bits<rows, vectors> : multiply_eight_bits<rows, vectors>;
    for (int64_t s = 0; s < steps; ++s) {
        __m256i products[rows][vectors];
        multiply(w, w_stride, x, offsets, step, products);
        w += step;
        x += step / 4 * VECTORS;
        offsets += step / columns_of_sum<bits>(step) * VECTORS;
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) {
            const __m256 scale = _mm256_broadcast_ss(scales + row * scales_stride + s);
            const __m256 shift = _mm256_broadcast_ss(shifts + row * scales_stride + s);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) {
                __m256& to = sums[row * VECTORS + v];
                const __m256 both = _mm256_mul_ps(scale, x_scales[s * VECTORS + v]);
                to = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[row][v]), both, to);
                to = _mm256_fnmadd_ps(shift, x_sums[s * VECTORS + v], to);
            }
        }
    }
}

// Multiply rows [first, first + rows) with tokens [start, end). `start` is the first token of a tile.
template <int bits>
void multiply_rows(const Weights& w, const Scales& scales, const Tiles& t, int64_t step, int64_t first, int64_t rows,
                   int64_t tokens, int64_t start, int64_t end, std::vector<__m256i>& weights, std::vector<__m256>& sums,
                   float* y) {
    const int64_t steps = w.columns / step, tiles = (end - start + WIDTH - 1) / WIDTH;
    uint8_t* unpacked = reinterpret_cast<uint8_t*>(weights.data());
    sums.assign(tiles * rows * VECTORS, _mm256_setzero_ps());
    for (int64_t from = 0; from < w.columns; from += AT_ONCE) {
        const int64_t to = std::min(from + AT_ONCE, w.columns), stride = to - from;
        for (int64_t row = 0; row < rows; ++row) unpack<bits>(w, first + row, from, to, unpacked + row * stride);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t in_all = start / WIDTH + tile, at = (in_all * steps + from / step) * VECTORS;
            const bool is_half = tokens - in_all * WIDTH <= LANES;
            const auto block = [&](auto rows_at_once, int64_t row) {
                constexpr int n = decltype(rows_at_once)::value;
                const auto multiply = is_half ? multiply_block<bits, n, 1> : multiply_block<bits, n, VECTORS>;
                const int64_t of_row = row * steps + from / step;
                multiply(unpacked + row * stride, stride, &scales.scales[of_row], &scales.shifts[of_row], steps,
                         &t.values[(in_all * w.columns + from) / 4 * VECTORS],
                         &t.offsets[(in_all * w.columns + from) / columns_of_sum<bits>(step) * VECTORS], &t.scales[at],
                         &t.sums[at], (to - from) / step, step, &sums[(tile * rows + row) * VECTORS]);
            };
            int64_t row = 0;
            for (; row + ROWS_AT_ONCE <= rows; row += ROWS_AT_ONCE)
                block(std::integral_constant<int, ROWS_AT_ONCE>(), row);
            for (; row < rows; ++row) block(std::integral_constant<int, 1>(), row);
        }
    }
    const float* flat = reinterpret_cast<const float*>(sums.data());
    for (int64_t token = start; token < end; ++token)
        for (int64_t row = 0; row < rows; ++row)
            y[token * w.rows + first + row] = flat[((token - start) / WIDTH * rows + row) * WIDTH + token % WIDTH];
}

template <int bits>
void multiply_many(const Weights& w, const float* x, int64_t tokens, float* y) {
    const int64_t step = w.group % 128 ? w.group % 64 ? 32 : 64 : 128;
    const Tiles t = tiled<bits>(x, tokens, w, step);
    tbb::parallel_for(tbb::blocked_range<int64_t>(0, (w.rows + ROWS - 1) / ROWS), [&](const auto& range) {
        std::vector<__m256i> weights(ROWS * AT_ONCE / UNIT);
        std::vector<__m256> sums;
        for (int64_t task = range.begin(); task < range.end(); ++task) {
            const int64_t first = task * ROWS, rows = std::min(ROWS, w.rows - first);
            const Scales scales = scales_of(w, first, first + rows, step, MORE<bits>);
            for (int64_t start = 0; start < tokens; start += TOKENS)
                multiply_rows<bits>(w, scales, t, step, first, rows, tokens, start, std::min(start + TOKENS, tokens),
                                    weights, sums, y);
        }
    });
}

// x (..., columns) float32, values (rows, bytes) uint8, scales (rows, 2 * groups) uint8: the bytes of float16 and, if
// values are not signed, zero points (bytes) uint8 -> (..., rows) float32
class CompressedMatMul : public ov::op::Op {
public:
    OPENVINO_OP("CompressedMatMul", "optimum_llava_ov");

    CompressedMatMul() = default;
    CompressedMatMul(const ov::OutputVector& inputs, int64_t bits, int64_t group)
        : Op(inputs), m_bits(bits), m_group(group) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        ov::PartialShape shape = get_input_partial_shape(0);
        shape[shape.size() - 1] = get_input_partial_shape(1)[0];
        set_output_type(0, ov::element::f32, shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<CompressedMatMul>(inputs, m_bits, m_group);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("bits", m_bits);
        visitor.on_attribute("group_size", m_group);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        ov::Shape shape = inputs[0].get_shape();
        Weights w;
        w.values = static_cast<const uint8_t*>(inputs[1].data());
        w.scales = static_cast<const uint8_t*>(inputs[2].data());
        w.zero_points = inputs.size() > 3 ? static_cast<const uint8_t*>(inputs[3].data()) : nullptr;
        w.rows = static_cast<int64_t>(inputs[1].get_shape()[0]);
        w.columns = static_cast<int64_t>(shape.back());
        w.bits = m_bits;
        w.group = m_group;
        shape.back() = inputs[1].get_shape()[0];
        outputs[0].set_shape(shape);
        const float* x = inputs[0].data<float>();
        float* y = outputs[0].data<float>();
        const int64_t tokens = static_cast<int64_t>(inputs[0].get_size()) / w.columns;
        const auto run = [&](auto step) { multiply_few<decltype(step)>(w, x, tokens, y); };
        if (!tokens) return true;
        if (tokens >= MANY) {
            m_bits == 8 ? multiply_many<8>(w, x, tokens, y) : multiply_many<4>(w, x, tokens, y);
        } else if (m_bits == 8) {
            m_group % 128 ? run(EightBits<1>{}) : run(EightBits<4>{});
        } else if (m_group % 64) {
            run(FourBitsNarrow{});
        } else {
            m_group % 128 ? run(FourBits<1>{}) : run(FourBits<2>{});
        }
        return true;
    }

private:
    int64_t m_bits = 4, m_group = 128;
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(
    std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<CompressedMatMul>>()}));
