// The vector type of an instruction set: Vec, kLanes float32 in the compiler's own vectors (GCC's and Clang's vector
// extension), and its free functions. +, -, *, / and comparisons are the compiler's; a float operand is splatted.
//
//     splat(x)                       x in all lanes
//     lane_numbers(first)            first, first + 1, …
//     load(p), store(p, v)           kLanes elements, float, BFloat16 or Half, unaligned
//     load_partial(p, n)             the first n (0 … kLanes), touching no memory beyond; zeros in the other lanes
//     store_partial(p, v, n)         likewise
//     stream(p, v)                   a store past the caches, to the address of a whole vector; others see it after
//                                    finish_streams()
//     keep_first(v, n)               v in the first n lanes, zero in the others
//     to_float(x), from_float(x, y)  one element
//     select(mask, a, b)             a where the mask's lane is set (all bits), b elsewhere; masks are comparisons' Ints
//     max(a, b), min(a, b)           b where either is NaN
//     abs(v)
//     multiply_add(a, b, c)          a * b + c, rounded once where the machine can
//     multiply_alone(a, b)           a * b, rounded before anything is added to it
//     quotient<exact>(a, b)          a / b for a and b within 2^-100 … 2^120, rounded but for one case in a hundred; not
//                                    exact, where the machine gains by that, to within 2^-14 of itself
//     reduce_add(v), reduce_max(v)   in the order of a tree: lane i with lane i + kLanes / 2, and so on
//     transpose(rows)                kLanes vectors as a square
//     sums_of(rows)                  lane i: the sum of the lanes of rows[i]; leaves no meaning in rows
//
// Narrowing rounds to nearest, ties to even; NaN stays NaN. Intrinsics stand only where compilers do poorly. An
// emulated instruction set has 16 lanes and AVX2's instructions: it takes the same paths as AVX-512, without its
// intrinsics.
#pragma once

#include <stdint.h>
#include <string.h>

#include "tensor.h"

#if defined(__x86_64__)
#    pragma GCC diagnostic push
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own _mm512_undefined_ps
#    pragma GCC diagnostic ignored "-Wuninitialized"
#    include <immintrin.h>
#    pragma GCC diagnostic pop
#endif

#if defined(__AVX512F__) && FASTATTN_LANES == 16
#    define FASTATTN_AVX512 1
#elif defined(__AVX2__) && FASTATTN_LANES == 8
#    define FASTATTN_AVX2 1
#elif defined(__SSE2__) && FASTATTN_LANES == 4
#    define FASTATTN_SSE2 1
#endif

namespace fastattn::FASTATTN_ISA {

constexpr int kLanes = FASTATTN_LANES;

typedef float Vec __attribute__((vector_size(4 * FASTATTN_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * FASTATTN_LANES)));  // also a comparison's result: lanes of 0 or -1
typedef uint32_t Bits __attribute__((vector_size(4 * FASTATTN_LANES)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * FASTATTN_LANES)));

// The same in memory of any alignment.
typedef float UnalignedVec __attribute__((vector_size(4 * FASTATTN_LANES), aligned(2), may_alias));
typedef uint16_t UnalignedHalfBits __attribute__((vector_size(2 * FASTATTN_LANES), aligned(2), may_alias));

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = __FLT_MAX__, kLowest = -kLargest;

// ---- Lanes ----------------------------------------------------------------------------------------------------------

FASTATTN_INLINE Vec splat(float x) { return x - Vec{}; }  // x - 0 is x for every x: a broadcast

FASTATTN_INLINE Ints lane_numbers(int32_t first) {
    Ints lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return lanes + first;
}

template <class Mask>  // Ints, or any integer vector of its size
FASTATTN_INLINE Vec select(Mask mask, Vec a, Vec b) {
    return Ints(mask) ? a : b;
}

FASTATTN_INLINE Vec abs(Vec v) { return Vec(Bits(v) & 0x7fffffffu); }

FASTATTN_INLINE Vec max(Vec a, Vec b) {
#if FASTATTN_AVX512
    return Vec(_mm512_max_ps(__m512(a), __m512(b)));
#elif FASTATTN_AVX2
    return Vec(_mm256_max_ps(__m256(a), __m256(b)));
#elif FASTATTN_SSE2
    return Vec(_mm_max_ps(__m128(a), __m128(b)));
#else
    return a > b ? a : b;
#endif
}

FASTATTN_INLINE Vec min(Vec a, Vec b) {
#if FASTATTN_AVX512
    return Vec(_mm512_min_ps(__m512(a), __m512(b)));
#elif FASTATTN_AVX2
    return Vec(_mm256_min_ps(__m256(a), __m256(b)));
#elif FASTATTN_SSE2
    return Vec(_mm_min_ps(__m128(a), __m128(b)));
#else
    return a < b ? a : b;
#endif
}

FASTATTN_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }  // the compiler contracts it where it can

FASTATTN_INLINE Vec multiply_alone(Vec a, Vec b) {
    // The compiler, which cannot see through an assembler statement, does not contract the product.
    Vec product = a * b;
#if FASTATTN_AVX512
    __asm__("" : "+v"(product));
#elif FASTATTN_AVX2 || FASTATTN_SSE2
    __asm__("" : "+x"(product));
#else
    __asm__("" : "+m"(product));
#endif
    return product;
}

// A division takes ten cycles where an estimate of 1 / b and a correction by what is left, a - near b, take five.
template <bool kExact>
FASTATTN_INLINE Vec quotient(Vec a, Vec b) {
#if FASTATTN_AVX512
    const __m512 inverse = _mm512_rcp14_ps(__m512(b)), near = _mm512_mul_ps(__m512(a), inverse);
    if constexpr (!kExact) return Vec(near);
    // What is left is exact only without a rounding in between, which a compiler that optimises less does not see to.
    const __m512 left = _mm512_fnmadd_ps(near, __m512(b), __m512(a));
    return Vec(_mm512_fmadd_ps(left, inverse, near));
#else
    return a / b;
#endif
}

FASTATTN_INLINE Vec keep_first(Vec v, int64_t n) { return select(lane_numbers(0) < static_cast<int32_t>(n), v, Vec{}); }

// ---- One element ----------------------------------------------------------------------------------------------------

namespace detail {

// Both directions as arithmetic on bits, for one element (uint32_t, float) or a vector of them (Bits, Vec).

template <class To, class From>
FASTATTN_INLINE To bit_cast(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class U, class F>
FASTATTN_INLINE U bfloat16_bits(F x) {
    const U bits = bit_cast<U>(x);
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return x != x ? ((bits >> 16) | 0x40u) : rounded;
}

// Half's exponent and mantissa, seen as a float's, are 2^112 too small: the product is exact, subnormals too.
template <class U, class F>
FASTATTN_INLINE F half_to_float(U half) {
    const U magnitude = (half & 0x7fffu) << 13;
    const F scaled = bit_cast<F>(U(magnitude)) * 0x1p112f;
    const U special = bit_cast<U>(scaled) | 0x7f800000u;  // infinity or NaN
    const U bits = magnitude >= (0x7c00u << 13) ? special : bit_cast<U>(scaled);
    return bit_cast<F>(U(bits | ((half & 0x8000u) << 16)));
}

template <class U, class F>
FASTATTN_INLINE U half_bits(F x) {
    const U bits = bit_cast<U>(x);
    const U magnitude = bits & 0x7fffffffu;
    // Normal numbers: round the mantissa to ten bits; the carry may reach the exponent, up to infinity.
    const U normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
    // Subnormals: adding 0.5 leaves the mantissa's bits, rounded, at the end of the word.
    const U subnormal = bit_cast<U>(F(bit_cast<F>(U(magnitude)) + 0.5f)) - 0x3f000000u;
    U result = magnitude < (113u << 23) ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? (result & 0u) + 0x7c00u : result;
    result = magnitude > 0x7f800000u ? (((magnitude >> 13) & 0x3ffu) | 0x7e00u) : result;
    return result | ((bits >> 16) & 0x8000u);
}

}  // namespace detail

FASTATTN_INLINE float to_float(float x) { return x; }
FASTATTN_INLINE float to_float(BFloat16 x) { return detail::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
FASTATTN_INLINE float to_float(Half x) {
#ifdef __F16C__
    return _cvtsh_ss(x.bits);
#else
    return detail::half_to_float<uint32_t, float>(x.bits);
#endif
}

FASTATTN_INLINE void from_float(float x, float& y) { y = x; }
FASTATTN_INLINE void from_float(float x, BFloat16& y) {
    y.bits = static_cast<uint16_t>(detail::bfloat16_bits<uint32_t, float>(x));
}
FASTATTN_INLINE void from_float(float x, Half& y) {
#ifdef __F16C__
    y.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    y.bits = static_cast<uint16_t>(detail::half_bits<uint32_t, float>(x));
#endif
}

// ---- Loads and stores -----------------------------------------------------------------------------------------------

FASTATTN_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }

FASTATTN_INLINE Vec load(const BFloat16* p) {
#if FASTATTN_AVX512  // GCC 12 widens each half of a vector by itself
    return Vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#elif FASTATTN_AVX2
    return Vec(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#else
    const HalfBits bits = *reinterpret_cast<const UnalignedHalfBits*>(p);
    return Vec(__builtin_convertvector(bits, Bits) << 16);
#endif
}

FASTATTN_INLINE Vec load(const Half* p) {
#if FASTATTN_AVX512
    return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif FASTATTN_AVX2
    return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    const HalfBits bits = *reinterpret_cast<const UnalignedHalfBits*>(p);
    return detail::half_to_float<Bits, Vec>(__builtin_convertvector(bits, Bits));
#endif
}

FASTATTN_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

FASTATTN_INLINE void store(BFloat16* p, Vec v) {
#if FASTATTN_AVX512 && defined(__AVX512BF16__)  // takes subnormals for zeros, as its products do
    const __m256bh bits = _mm512_cvtneps_pbh(__m512(v));
    memcpy(p, &bits, sizeof bits);
#elif FASTATTN_AVX2  // the bits are below 2^16 already, which GCC 12 does not see
    const __m256i bits = __m256i(detail::bfloat16_bits<Bits, Vec>(v));
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
#else
    *reinterpret_cast<UnalignedHalfBits*>(p) = __builtin_convertvector((detail::bfloat16_bits<Bits, Vec>(v)), HalfBits);
#endif
}

FASTATTN_INLINE void store(Half* p, Vec v) {
#if FASTATTN_AVX512
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif FASTATTN_AVX2
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#else
    *reinterpret_cast<UnalignedHalfBits*>(p) = __builtin_convertvector((detail::half_bits<Bits, Vec>(v)), HalfBits);
#endif
}

template <class T>
FASTATTN_INLINE Vec load_partial(const T* p, int64_t n) {
    T lanes[kLanes] = {};
    memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));  // which, as the vectors' loads, asks for no alignment
    return load(lanes);
}

template <class T>
FASTATTN_INLINE void store_partial(T* p, Vec v, int64_t n) {
    T lanes[kLanes];
    store(lanes, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

#if FASTATTN_AVX512
namespace detail {
FASTATTN_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
}  // namespace detail

FASTATTN_INLINE Vec load_partial(const float* p, int64_t n) {
    return Vec(_mm512_maskz_loadu_ps(detail::first_lanes(n), p));
}
FASTATTN_INLINE Vec load_partial(const BFloat16* p, int64_t n) {
    const __m256i bits = _mm256_maskz_loadu_epi16(detail::first_lanes(n), p);
    return Vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FASTATTN_INLINE Vec load_partial(const Half* p, int64_t n) {
    return Vec(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(detail::first_lanes(n), p)));
}
FASTATTN_INLINE void store_partial(float* p, Vec v, int64_t n) {
    _mm512_mask_storeu_ps(p, detail::first_lanes(n), __m512(v));
}
#elif FASTATTN_AVX2
FASTATTN_INLINE Vec load_partial(const float* p, int64_t n) {
    return Vec(_mm256_maskload_ps(p, __m256i(lane_numbers(0) < static_cast<int32_t>(n))));
}
FASTATTN_INLINE void store_partial(float* p, Vec v, int64_t n) {
    _mm256_maskstore_ps(p, __m256i(lane_numbers(0) < static_cast<int32_t>(n)), __m256(v));
}
#endif

template <class T>
FASTATTN_INLINE void stream(T* p, Vec v) {
#if FASTATTN_AVX512 || FASTATTN_AVX2
    T lanes[kLanes];
    store(lanes, v);
    if constexpr (sizeof lanes == 16) {
        __m128i bits;
        memcpy(&bits, lanes, sizeof bits);
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits);
    } else if constexpr (sizeof lanes == 32) {
        __m256i bits;
        memcpy(&bits, lanes, sizeof bits);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
    }
#    if FASTATTN_AVX512
    if constexpr (sizeof lanes == 64) {
        __m512i bits;
        memcpy(&bits, lanes, sizeof bits);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
    }
#    endif
#else
    store(p, v);
#endif
}

FASTATTN_INLINE void finish_streams() {
#if FASTATTN_AVX512 || FASTATTN_AVX2
    _mm_sfence();
#endif
}

// ---- Across lanes ---------------------------------------------------------------------------------------------------

namespace detail {

#if defined(__SSE2__)
struct Add {
    static FASTATTN_INLINE __m128 apply(__m128 a, __m128 b) { return _mm_add_ps(a, b); }
};
struct Max {
    static FASTATTN_INLINE __m128 apply(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
};

template <class Op>
FASTATTN_INLINE float reduce(Vec v) {
#    if FASTATTN_AVX512
    const __m256 low = _mm512_castps512_ps256(__m512(v)), high = _mm512_extractf32x8_ps(__m512(v), 1);
    const __m128 four = Op::apply(Op::apply(_mm256_castps256_ps128(low), _mm256_castps256_ps128(high)),
                                  Op::apply(_mm256_extractf128_ps(low, 1), _mm256_extractf128_ps(high, 1)));
#    else
    __m128 part[kLanes / 4];
    memcpy(part, &v, sizeof v);
    for (int half = kLanes / 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) part[i] = Op::apply(part[i], part[i + half]);
    }
    const __m128 four = part[0];
#    endif
    const __m128 two = Op::apply(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(Op::apply(two, _mm_shuffle_ps(two, two, 1)));
}
#else
struct Add {
    static FASTATTN_INLINE float apply(float a, float b) { return a + b; }
};
struct Max {
    static FASTATTN_INLINE float apply(float a, float b) { return a > b ? a : b; }
};

template <class Op>
FASTATTN_INLINE float reduce(Vec v) {
    float part[kLanes];
    memcpy(part, &v, sizeof v);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) part[i] = Op::apply(part[i], part[i + half]);
    }
    return part[0];
}
#endif

}  // namespace detail

FASTATTN_INLINE float reduce_add(Vec v) { return detail::reduce<detail::Add>(v); }
FASTATTN_INLINE float reduce_max(Vec v) { return detail::reduce<detail::Max>(v); }  // NaN or not where a lane is NaN

// (v1, v0, v3, v2, …).
FASTATTN_INLINE Vec swap_neighbours(Vec v) {
#if FASTATTN_AVX512
    return Vec(_mm512_permute_ps(__m512(v), 0xb1));
#elif FASTATTN_AVX2
    return Vec(_mm256_permute_ps(__m256(v), 0xb1));
#else
    Vec swapped;
    for (int i = 0; i < kLanes; ++i) swapped[i] = v[i ^ 1];
    return swapped;
#endif
}

// Lane j of rows[i] goes to lane i of rows[j].
FASTATTN_INLINE void transpose(Vec (&rows)[kLanes]) {
#if FASTATTN_AVX2
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(__m256(rows[i]), __m256(rows[i + 1]));
        pairs[i + 1] = _mm256_unpackhi_ps(__m256(rows[i]), __m256(rows[i + 1]));
    }
    for (int i = 0; i < 8; i += 4) {
        fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = Vec(_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
        rows[i + 4] = Vec(_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
    }
#elif FASTATTN_AVX512
    __m512 pairs[16], fours[16], eights[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(__m512(rows[i]), __m512(rows[i + 1]));
        pairs[i + 1] = _mm512_unpackhi_ps(__m512(rows[i]), __m512(rows[i + 1]));
    }
    for (int i = 0; i < 16; i += 4) {
        fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    // fours[4 g + j]: its 128-bit part q holds column 4 q + j of rows 4 g … 4 g + 3.
    for (int j = 0; j < 4; ++j) {
        eights[j] = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88);           // parts 0 and 2 of rows 0 … 7
        eights[4 + j] = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);       // parts 1 and 3
        eights[8 + j] = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88);  // of rows 8 … 15
        eights[12 + j] = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; ++j) {
        rows[j] = Vec(_mm512_shuffle_f32x4(eights[j], eights[8 + j], 0x88));
        rows[4 + j] = Vec(_mm512_shuffle_f32x4(eights[4 + j], eights[12 + j], 0x88));
        rows[8 + j] = Vec(_mm512_shuffle_f32x4(eights[j], eights[8 + j], 0xdd));
        rows[12 + j] = Vec(_mm512_shuffle_f32x4(eights[4 + j], eights[12 + j], 0xdd));
    }
#else
    float from[kLanes][kLanes], to[kLanes][kLanes];
    memcpy(from, rows, sizeof from);
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < kLanes; ++j) to[j][i] = from[i][j];
    }
    memcpy(rows, to, sizeof to);
#endif
}

FASTATTN_INLINE Vec sums_of(Vec (&rows)[kLanes]) {
#if FASTATTN_AVX2
    for (int i = 0; i < 4; ++i) {
        const __m256 a = __m256(rows[2 * i]), b = __m256(rows[2 * i + 1]);
        rows[i] = Vec(_mm256_unpacklo_ps(a, b)) + Vec(_mm256_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 2; ++i) {
        const __m256 a = __m256(rows[2 * i]), b = __m256(rows[2 * i + 1]);
        rows[i] = Vec(_mm256_shuffle_ps(a, b, 0x44)) + Vec(_mm256_shuffle_ps(a, b, 0xee));
    }
    const __m256 a = __m256(rows[0]), b = __m256(rows[1]);
    return Vec(_mm256_permute2f128_ps(a, b, 0x20)) + Vec(_mm256_permute2f128_ps(a, b, 0x31));
#elif FASTATTN_AVX512
#    pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512 a = __m512(rows[2 * i]), b = __m512(rows[2 * i + 1]);
        rows[i] = Vec(_mm512_unpacklo_ps(a, b)) + Vec(_mm512_unpackhi_ps(a, b));
    }
#    pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
        const __m512 a = __m512(rows[2 * i]), b = __m512(rows[2 * i + 1]);
        rows[i] = Vec(_mm512_shuffle_ps(a, b, 0x44)) + Vec(_mm512_shuffle_ps(a, b, 0xee));
    }
    // rows[i] is four 128-bit parts, each with a share of the sums of rows 4 i … 4 i + 3.
#    pragma GCC unroll 8
    for (int i = 0; i < 2; ++i) {
        const __m512 a = __m512(rows[2 * i]), b = __m512(rows[2 * i + 1]);
        rows[i] = Vec(_mm512_shuffle_f32x4(a, b, 0x88)) + Vec(_mm512_shuffle_f32x4(a, b, 0xdd));
    }
    const __m512 a = __m512(rows[0]), b = __m512(rows[1]);
    return Vec(_mm512_shuffle_f32x4(a, b, 0x88)) + Vec(_mm512_shuffle_f32x4(a, b, 0xdd));
#else
    transpose(rows);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) rows[i] += rows[i + half];
    }
    return rows[0];
#endif
}

}  // namespace fastattn::FASTATTN_ISA
