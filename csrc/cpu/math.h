// exp2, exp, tanh and the normal distribution on Vec. NaN stays NaN. Largest errors measured over float32, in units of
// the last place, with (without) fused multiply-add: exp2 0.9 (1.2), exp 1.2 (1.5), tanh 1.5 (1.4),
// exp_and_less_one 1.0 and 1.4 (1.0 and 1.4). normal_cdf is off by 4.1e-8 at most, and by 3.4e-6 of itself from -5.5 on.
//
//     exp2   x = n + f, n whole (found by adding and subtracting 1.5 * 2^23), |f| <= 1/2:  2^n (1 + f P(f))
//     exp    n = round(x / ln 2), r = x - n ln 2 with ln 2 in two parts;  2^n 2^(r / ln 2)
//     exp and exp - 1    r as above, p = r + r^2 Q(r) = e^r - 1:  2^n + 2^n p  and  (2^n - 1) + 2^n p
//     tanh   |x| < 0.6:  x + x^3 P(x^2);   else 1 - 2 / (exp(2 |x|) + 1), with x's sign
//     normal_cdf(-|x|) = 2^Q(|x|), and 1 minus that for positive x
//
// The polynomials are least-maximum fits of the relative error of the result; Q of the absolute error of 2^Q, and of
// |x| 2^Q, with a hundredth of the weight for the relative one.
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

// x - whole * ln 2. 0.693359375 has nine bits: its product with `whole` is exact without a fused multiply-add, too.
FASTATTN_INLINE Vec less_whole_powers(Vec x, Vec whole) {
    const Vec rest = multiply_add(whole, splat(-0.693359375f), x);
    return multiply_add(whole, splat(2.12194440054690583e-4f), rest);
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
    const Vec rest = detail::less_whole_powers(bounded, whole);
    const Vec value = detail::exp2_fraction(rest * kLog2E) * power.value * select(large, splat(0x1p64f), splat(1.0f));
    return select(x < splat(-87.33654f), Vec{}, value);
}

// e^x and e^x - 1, each to its own last places, for |x| <= 87; without meaning beyond.
struct Exponential {
    Vec value, less_one;
};
FASTATTN_INLINE Exponential exp_and_less_one(Vec x) {
    const detail::Power power = detail::whole_power(x * kLog2E);
    const Vec rest = detail::less_whole_powers(x, power.whole);
    Vec q = splat(0.000198458773f);
    q = multiply_add(q, rest, splat(0.00139406184f));
    q = multiply_add(q, rest, splat(0.00833338965f));
    q = multiply_add(q, rest, splat(0.0416663624f));
    q = multiply_add(q, rest, splat(0.166666657f));
    q = multiply_add(q, rest, splat(0.5f));
    const Vec rise = multiply_add(rest * rest, q, rest);
    return {multiply_add(rise, power.value, power.value), multiply_add(rise, power.value, power.value - 1.0f)};
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

FASTATTN_INLINE Vec normal_cdf(Vec x) {
    const Vec magnitude = min(splat(16.0f), abs(x));  // far enough for 0
    Vec q = splat(-2.39038975e-08f);
    q = multiply_add(q, magnitude, splat(7.2727272e-07f));
    q = multiply_add(q, magnitude, splat(-9.50329559e-06f));
    q = multiply_add(q, magnitude, splat(6.76356067e-05f));
    q = multiply_add(q, magnitude, splat(-0.00024838181f));
    q = multiply_add(q, magnitude, splat(-6.6486391e-05f));
    q = multiply_add(q, magnitude, splat(0.00702961069f));
    q = multiply_add(q, magnitude, splat(-0.0524975881f));
    q = multiply_add(q, magnitude, splat(-0.459202647f));
    q = multiply_add(q, magnitude, splat(-1.15110612f));
    const Vec tail = exp2_bounded(multiply_add(q, magnitude, splat(-1.0f)));
    return select(x < Vec{}, tail, 1.0f - tail);
}

}  // namespace fastattn::FASTATTN_ISA
