// exp2, exp, tanh and erf on Vec. NaN stays NaN. Largest errors measured over float32, in units of the last place, with
// (without) fused multiply-add: exp2 0.9 (1.2), exp 1.2 (1.5), tanh 1.5 (1.4), erf 1.3 (1.4).
//
//     exp2   x = n + f, n whole (found by adding and subtracting 1.5 * 2^23), |f| <= 1/2:  2^n (1 + f P(f))
//     exp    n = round(x / ln 2), r = x - n ln 2 with ln 2 in two parts;  2^n 2^(r / ln 2)
//     tanh   |x| < 0.6:  x + x^3 P(x^2);   else 1 - 2 / (exp(2 |x|) + 1), with x's sign
//     erf    |x| < 0.9:  x + x P(x^2);         else 1 - 2^Q(|x|), with x's sign: Q is log2(erfc)
//
// The polynomials are least-maximum fits of the relative error of the result.
#pragma once

#include "simd.h"

extern "C" double log(double);  // not <math.h>: its overloads in C++ are functions that instruction sets would share

namespace fastattn::FASTATTN_ISA {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

namespace detail {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a float of this size has no place for a fraction

// 2^f for |f| <= 1/2.
FASTATTN_INLINE Vec exp2_fraction(Vec f) {
    Vec p = splat(0.000153533618f);
    p = multiply_add(p, f, splat(0.00133988744f));
    p = multiply_add(p, f, splat(0.00961843736f));
    p = multiply_add(p, f, splat(0.0555033247f));
    p = multiply_add(p, f, splat(0.240226479f));
    p = multiply_add(p, f, splat(0.693147203f));
    return multiply_add(p, f, splat(1.0f));
}

// x rounded to whole numbers, and 2 to that power, for -126 <= x <= 127.
struct Power {
    Vec whole, value;
};
FASTATTN_INLINE Power whole_power(Vec x) {
    // The exponent's bias in the constant makes the sum's last bits the exponent of 2^whole.
    const Vec shifted = x + splat(kRound + 127.0f);
    return {shifted - splat(kRound + 127.0f), Vec(Bits(shifted) << 23)};
}

FASTATTN_INLINE Vec with_sign_of(Vec magnitude, Vec sign) { return Vec(Bits(magnitude) | (Bits(sign) & 0x80000000u)); }

}  // namespace detail

// 2^x for x <= 127: what a softmax needs. 0 below -126, where results would be subnormal.
FASTATTN_INLINE Vec exp2_bounded(Vec x) {
    const detail::Power power = detail::whole_power(x);
    const Vec value = detail::exp2_fraction(x - power.whole) * power.value;
    return select(x < splat(-126.0f), Vec{}, value);
}

// 2^x. 0 below -126; infinity from 128 on.
FASTATTN_INLINE Vec exp2(Vec x) {
    const auto large = x > splat(64.0f);
    const Vec reduced = select(large, min(splat(190.0f), x) - 64.0f, x);
    return exp2_bounded(reduced) * select(large, splat(0x1p64f), splat(1.0f));
}

// e^x. 0 below -87.33, where results would be subnormal.
FASTATTN_INLINE Vec exp(Vec x) {
    const auto large = x > splat(64.0f);
    const Vec bounded = min(splat(130.0f), x);
    const detail::Power power = detail::whole_power(bounded * kLog2E - select(large, splat(64.0f), Vec{}));
    const Vec whole = power.whole + select(large, splat(64.0f), Vec{});
    // 0.693359375 has nine bits: its product with `whole` is exact without a fused multiply-add, too.
    Vec rest = multiply_add(whole, splat(-0.693359375f), bounded);
    rest = multiply_add(whole, splat(2.12194440054690583e-4f), rest);
    const Vec value = detail::exp2_fraction(rest * kLog2E) * power.value * select(large, splat(0x1p64f), splat(1.0f));
    return select(x < splat(-87.33654f), Vec{}, value);
}

FASTATTN_INLINE Vec tanh(Vec x) {
    const Vec square = x * x;
    Vec p = splat(-0.00590586836f);
    p = multiply_add(p, square, splat(0.0208053845f));
    p = multiply_add(p, square, splat(-0.0537866836f));
    p = multiply_add(p, square, splat(0.133319582f));
    p = multiply_add(p, square, splat(-0.333332993f));
    const Vec magnitude = abs(x);
    const Vec small = multiply_add(p * square, x, x);
    const Vec large = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
    return select(magnitude < splat(0.6f), small, detail::with_sign_of(large, x));
}

FASTATTN_INLINE Vec erf(Vec x) {
    const Vec square = x * x;
    Vec p = splat(8.51310368e-05f);
    p = multiply_add(p, square, splat(-0.00081756392f));
    p = multiply_add(p, square, splat(0.00520385915f));
    p = multiply_add(p, square, splat(-0.0268605085f));
    p = multiply_add(p, square, splat(0.11283715f));
    p = multiply_add(p, square, splat(-0.37612635f));
    p = multiply_add(p, square, splat(0.128379167f));
    const Vec magnitude = min(splat(4.0f), abs(x));
    Vec q = splat(-3.00492079e-05f);
    q = multiply_add(q, magnitude, splat(0.000622367876f));
    q = multiply_add(q, magnitude, splat(-0.00599620163f));
    q = multiply_add(q, magnitude, splat(0.0361836645f));
    q = multiply_add(q, magnitude, splat(-0.156128987f));
    q = multiply_add(q, magnitude, splat(-0.913804287f));
    q = multiply_add(q, magnitude, splat(-1.62950731f));
    q = multiply_add(q, magnitude, splat(0.000244109582f));
    const Vec large = 1.0f - exp2_bounded(q);
    return select(magnitude < splat(0.9f), multiply_add(x, p, x), detail::with_sign_of(large, x));
}

}  // namespace fastattn::FASTATTN_ISA
