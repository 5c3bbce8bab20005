// The register tile that every matrix product of the CPU kernels is made of, and the packing of its operands.
//
//     C (kTileRows x kTileColumns)  =  [C +]  A (kTileRows x depth) . B (depth x kTileColumns)            in float32
//
//                      b: a panel            One step broadcasts kTileRows elements of A, each against the kTileVectors
//                    +-------------+         vectors of one row of B, into kTileRows * kTileVectors accumulators that
//              step  |  .  .  .  . |         stay in registers. B is read in order: a panel holds `depth` rows of
//                    +-------------+         kTileColumns elements. A may be packed the same way (kTileRows elements a
//       step                                 step) or lie in any matrix with strides.
//      +-----+       +-------------+
//    a |  .  |       |  C: tile    |         A step is 2 * kTileRows * kTileColumns flops for kTileVectors + kTileRows
//      +-----+       +-------------+         loads: the multiply-add units are the bound once depth hides the start.
//
// Products:
//     tile_product<kRows, kVectors>(depth, a, a_row, a_step, b, b_step, c, c_row, accumulate)
//         element (r, s) of A at a[r * a_row + s * a_step]; row s of B at b + s * b_step; row r of C at c + r * c_row.
//         kRows <= kTileRows rows and kVectors <= kTileVectors vectors of columns are computed (all by default).
//     tile_product(a, b, depth, c, accumulate)
//         both packed, C contiguous: a_row 1, a_step kTileRows, b_step = c_row = kTileColumns.
//     tile_rows(rows, …)                    the first with `rows` known at run time only, 1 … kTileRows
//     tile_rows<T, kTileRows, 1>(rows, …)   the same for one vector of columns
//
// The same with bfloat16 operands and float32 sums, where kBFloat16Pairs (avx512_bf16, amx and their emulations): `a`
// and `b` are BFloat16Pair, two steps of one row or column in 32 bits, and strides and depth count pairs. A product is
// rounded once it has been added (the instruction flushes subnormals to zero).
//
// Where such products run on a matrix unit (kOnUnit<T>, matrix_unit.h) the tile has kStripRows<T> = 32 rows, a_step is 1,
// and operands' depth is filled up with zeros to whole kWholeSteps<T>.
//
// Packing (T is float, BFloat16 or Half; element (s, j) at from[s * step + j * stride]):
//     pack_panel(from, step, stride, depth, columns, panel)         j: a column of B, kTileColumns a step, zeros beyond
//     pack_strip(from, step, stride, depth, rows, strip)            j: a row of A, kTileRows a step, zeros beyond
//     pack_pairs<kWidth>(from, step, stride, depth, count, packed)  the same as pairs, kWidth columns or rows a step;
//                                                                   an odd depth is filled up with zeros
//     pack_rows(from, step, stride, depth, rows, length, packed)    pairs, `length` a row and next to each other, as a
//                                                                   matrix unit takes A; zeros up to kWholeSteps
//     store_operand(to, v)                                          kLanes steps of a row, rounded to its type
//     store_operand(to, low, high)                                  kLanes pairs of two steps that were computed
// Both transpose while they copy where j is not the dimension that lies next to each other.
#pragma once

#include "integers.h"
#include "matrix_unit.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;
constexpr int kTileRows = kLanes == 4 ? 4 : kLanes == 8 ? 6 : 12;

#ifdef FASTATTN_BF16_PAIRS
constexpr bool kBFloat16Pairs = true;
#else
constexpr bool kBFloat16Pairs = false;
#endif

// Rows of A that a tile takes, and the steps that an operand's depth is filled up to.
template <class T>
constexpr int64_t kStripRows = kOnUnit<T> ? kUnitRows : kTileRows;
template <class T>
constexpr int64_t kWholeSteps = kOnUnit<T> ? kUnitSteps : 1;

namespace detail {

FASTATTN_INLINE Vec load_step(const float* b) { return load(b); }
FASTATTN_INLINE Vec splat_step(const float* a) { return splat(*a); }
FASTATTN_INLINE Vec add_product(Vec sum, const float*, Vec a, Vec b) { return sum + a * b; }

FASTATTN_INLINE Vec load_step(const BFloat16Pair* b) { return load(reinterpret_cast<const float*>(b)); }
FASTATTN_INLINE Vec splat_step(const BFloat16Pair* a) { return Vec(a->bits + Bits{}); }
FASTATTN_INLINE Vec add_product(Vec sum, const BFloat16Pair*, Vec a, Vec b) {
#if defined(__AVX512BF16__) && FASTATTN_AVX512
    return Vec(_mm512_dpbf16_ps(__m512(sum), reinterpret_cast<__m512bh&>(a), reinterpret_cast<__m512bh&>(b)));
#else
    const Vec a_low = Vec(Bits(a) << 16), b_low = Vec(Bits(b) << 16);
    const Vec a_high = Vec(Bits(a) & 0xffff0000u), b_high = Vec(Bits(b) & 0xffff0000u);
    return (sum + a_low * b_low) + a_high * b_high;
#endif
}

// Where products and sums are rounded apart: short chains keep the sums' share of it small.
constexpr int64_t kChain = 16;

template <int kRows, int kVectors, class T>
FASTATTN_INLINE void one_chain(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step,
                               float* c, int64_t c_row, bool accumulate) {
    Vec sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec{};
    }
    for (int64_t s = 0; s < depth; ++s) {
        Vec right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = detail::load_step(b + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const Vec left = detail::splat_step(a + r * a_row);
            for (int v = 0; v < kVectors; ++v) sum[r][v] = detail::add_product(sum[r][v], a, left, right[v]);
        }
        a += a_step;
        b += b_step;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            float* place = c + r * c_row + v * kLanes;
            store(place, accumulate ? load(place) + sum[r][v] : sum[r][v]);
        }
    }
}

}  // namespace detail

template <int kRows = kTileRows, int kVectors = kTileVectors, class T>
FASTATTN_INLINE void tile_product(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step,
                                  float* c, int64_t c_row, bool accumulate) {
    if constexpr (kOnUnit<T>) {
        return unit_product<true, kVectors == kTileVectors>(depth, a, a_row, b, b_step, c, c_row, accumulate);
    }
#ifndef __FMA__
    for (; depth > detail::kChain; depth -= detail::kChain) {
        detail::one_chain<kRows, kVectors>(detail::kChain, a, a_row, a_step, b, b_step, c, c_row, accumulate);
        a += detail::kChain * a_step;
        b += detail::kChain * b_step;
        accumulate = true;
    }
#endif
    detail::one_chain<kRows, kVectors>(depth, a, a_row, a_step, b, b_step, c, c_row, accumulate);
}

template <class T>
FASTATTN_INLINE void tile_product(const T* a, const T* b, int64_t depth, float* c, bool accumulate) {
    tile_product(depth, a, 1, kTileRows, b, kTileColumns, c, kTileColumns, accumulate);
}

// The products of column j of two panels, `b_step` a step, for kLanes columns j: what tile_product gives for them as a
// row of A and a column of B, to the bit.
template <class T>
FASTATTN_INLINE Vec column_products(int64_t depth, const T* a, const T* b, int64_t b_step) {
#ifdef __FMA__
    const int64_t chain = depth;
#else
    const int64_t chain = detail::kChain;
#endif
    Vec total{};
    for (int64_t first = 0; first < depth; first += chain) {
        Vec sum{};
        for (int64_t s = first; s < depth && s < first + chain; ++s) {
            sum = detail::add_product(sum, a, detail::load_step(a + s * b_step), detail::load_step(b + s * b_step));
        }
        total += sum;
    }
    return total;
}

// Compiled once for each number of rows, not inlined.
template <class T, int kRows = kTileRows, int kVectors = kTileVectors>
__attribute__((noinline)) void tile_rows(int rows, int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b,
                                         int64_t b_step, float* c, int64_t c_row, bool accumulate) {
    if constexpr (kOnUnit<T>) {
        constexpr bool kBothColumns = kVectors == kTileVectors;
        if (rows <= kUnitRows / 2) {
            unit_product<false, kBothColumns>(depth, a, a_row, b, b_step, c, c_row, accumulate);
        } else {
            unit_product<true, kBothColumns>(depth, a, a_row, b, b_step, c, c_row, accumulate);
        }
        return;
    } else if constexpr (kRows > 1) {
        if (rows < kRows) {
            return tile_rows<T, kRows - 1, kVectors>(rows, depth, a, a_row, a_step, b, b_step, c, c_row, accumulate);
        }
    }
    tile_product<kRows, kVectors>(depth, a, a_row, a_step, b, b_step, c, c_row, accumulate);
}

// ---- Packing --------------------------------------------------------------------------------------------------------

namespace detail {

// The first n elements (all of a vector, some or none of them), zeros beyond.
template <class T>
FASTATTN_INLINE Vec load_first(const T* from, int64_t n) {
    return n >= kLanes ? load(from) : n > 0 ? load_partial(from, n) : Vec{};
}

// kWidth elements a step; `count` of them are there, the rest is zero.
template <int kWidth, class T>
inline void pack(const T* from, int64_t step, int64_t stride, int64_t depth, int64_t count, float* packed) {
    static_assert(kWidth < kLanes || kWidth % kLanes == 0, "vectors overlap into the next step only");
    if (stride == 1) {
        for (int64_t s = 0; s < depth; ++s) {
            const T* row = from + s * step;
            float* to = packed + s * kWidth;
            if (kWidth < kLanes && s + 1 == depth) {
                store_partial(to, load_first(row, count), kWidth);
            } else {
                for (int j = 0; j < kWidth; j += kLanes) store(to + j, load_first(row + j, count - j));
            }
        }
        return;
    }
    if (step == 1) {
        for (int64_t s = 0; s < depth; s += kLanes) {
            for (int first = 0; first < kWidth; first += kLanes) {
                Vec rows[kLanes];
                for (int j = 0; j < kLanes; ++j) {
                    rows[j] = first + j < count ? load_first(from + s + (first + j) * stride, depth - s) : Vec{};
                }
                transpose(rows);
                for (int i = 0; i < kLanes && s + i < depth; ++i) {
                    float* to = packed + (s + i) * kWidth + first;
                    if (kWidth - first >= kLanes) {
                        store(to, rows[i]);
                    } else {
                        store_partial(to, rows[i], kWidth - first);
                    }
                }
            }
        }
        return;
    }
    for (int64_t s = 0; s < depth; ++s) {
        for (int64_t j = 0; j < kWidth; ++j) {
            packed[s * kWidth + j] = j < count ? to_float(from[s * step + j * stride]) : 0.0f;
        }
    }
}

}  // namespace detail

FASTATTN_INLINE void store_operand(float* to, Vec v) { store(to, v); }

#if defined(__AVX512BF16__) && FASTATTN_AVX512  // flushes subnormals to zero, as the product does
FASTATTN_INLINE void store_operand(BFloat16* to, Vec v) {
    const __m256bh narrow = _mm512_cvtneps_pbh(__m512(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<const __m256i&>(narrow));
}

FASTATTN_INLINE void store_operand(BFloat16Pair* to, Vec low, Vec high) {
    const __m512bh halves = _mm512_cvtne2ps_pbh(__m512(high), __m512(low));
    const __m512i bits = reinterpret_cast<const __m512i&>(halves);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, bits));
}
#else
FASTATTN_INLINE void store_operand(BFloat16* to, Vec v) { store(to, v); }

FASTATTN_INLINE void store_operand(BFloat16Pair* to, Vec low, Vec high) {
    const Bits pairs = detail::bfloat16_bits<Bits, Vec>(low) | detail::bfloat16_bits<Bits, Vec>(high) << 16;
    store(reinterpret_cast<float*>(to), Vec(pairs));
}
#endif

// depth * kTileColumns floats.
template <class T>
inline void pack_panel(const T* from, int64_t step, int64_t stride, int64_t depth, int64_t columns, float* panel) {
    detail::pack<kTileColumns>(from, step, stride, depth, columns, panel);
}

// depth * kTileRows floats.
template <class T>
inline void pack_strip(const T* from, int64_t step, int64_t stride, int64_t depth, int64_t rows, float* strip) {
    detail::pack<kTileRows>(from, step, stride, depth, rows, strip);
}

// (depth + 1) / 2 * kWidth pairs.
template <int kWidth>
inline void pack_pairs(const BFloat16* from, int64_t step, int64_t stride, int64_t depth, int64_t count,
                       BFloat16Pair* packed) {
    int64_t s = 0;
    if (step == 1 && kWidth % kLanes == 0) {  // two steps of a column are a pair as they lie: transpose 32-bit elements
        for (; s + 1 < depth; s += 2 * kLanes) {
            const int64_t pairs = (depth - s) / 2;
            for (int first = 0; first < kWidth; first += kLanes) {
                Vec rows[kLanes];
                for (int j = 0; j < kLanes; ++j) {
                    const float* column = reinterpret_cast<const float*>(from + s + (first + j) * stride);
                    rows[j] = first + j < count ? detail::load_first(column, pairs) : Vec{};
                }
                transpose(rows);
                BFloat16Pair* to = packed + s / 2 * kWidth + first;
                for (int i = 0; i < kLanes && i < pairs; ++i) store(reinterpret_cast<float*>(to + i * kWidth), rows[i]);
            }
        }
        s = depth & ~int64_t{1};
    }
    for (; s < depth; s += 2) {
        const BFloat16 *low = from + s * step, *high = low + step;
        BFloat16Pair* to = packed + s / 2 * kWidth;
        int64_t j = 0;
        if (stride == 1 && s + 1 < depth) {
            const bool ends = kWidth < kLanes && s + 2 >= depth;  // nothing may be written beyond the last step
            for (; j < kWidth; j += kLanes) {
                const Vec first = detail::load_first(low + j, count - j),
                          second = detail::load_first(high + j, count - j);
                const Vec pairs = Vec((Bits(first) >> 16) | Bits(second));
                if (ends) {
                    store_partial(reinterpret_cast<float*>(to + j), pairs, kWidth);
                } else {
                    store(reinterpret_cast<float*>(to + j), pairs);
                }
            }
        }
        for (; j < count; ++j) {
            const uint32_t second = s + 1 < depth ? high[j * stride].bits : 0;
            to[j].bits = low[j * stride].bits | second << 16;
        }
        for (; j < kWidth; ++j) to[j].bits = 0;
    }
}

// (rows, length) pairs, of which whole kUnitSteps are written.
inline void pack_rows(const BFloat16* from, int64_t step, int64_t stride, int64_t depth, int64_t rows, int64_t length,
                      BFloat16Pair* packed) {
    for (int64_t s = 0; s < depth; s += 2 * kUnitSteps) {
        for (int64_t j = 0; j < rows; j += kLanes) {
            for (int64_t first = 0; first < kUnitSteps; first += kLanes) {  // kLanes rows and steps: a square
                Vec square[kLanes];
                const int64_t begin = s + 2 * first, count = smaller(rows - j, kLanes);
                if (step == 1) {
                    for (int i = 0; i < kLanes; ++i) {
                        const BFloat16* row = from + (j + i) * stride + begin;
                        const int64_t there = i < count ? depth - begin : 0;
                        BFloat16 kept[2 * kLanes] = {};
                        for (int64_t x = 0; there < 2 * kLanes && x < there; ++x) kept[x] = row[x];
                        square[i] = load(reinterpret_cast<const float*>(there < 2 * kLanes ? kept : row));
                    }
                } else {
                    for (int i = 0; i < kLanes; ++i) {
                        Vec halves[2];
                        for (int half = 0; half < 2; ++half) {
                            const int64_t d = begin + 2 * i + half;
                            const BFloat16* row = from + d * step + j * stride;
                            if (d >= depth) {
                                halves[half] = Vec{};
                            } else if (stride == 1) {
                                halves[half] = detail::load_first(row, count);
                            } else {
                                BFloat16 kept[kLanes] = {};
                                for (int64_t x = 0; x < count; ++x) kept[x] = row[x * stride];
                                halves[half] = load(kept);
                            }
                        }
                        square[i] = Vec((Bits(halves[0]) >> 16) | Bits(halves[1]));
                    }
                    transpose(square);
                }
                for (int i = 0; i < count; ++i) {
                    store(reinterpret_cast<float*>(packed + (j + i) * length + s / 2 + first), square[i]);
                }
            }
        }
    }
}

}  // namespace fastattn::FASTATTN_ISA
