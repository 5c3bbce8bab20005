// The activations of linear and feed-forward, and gradients through them, on Vec.
//
//     relu       max(x, 0)                            1 where x > 0
//     gelu       x Phi(x)                             Phi(x) + x phi(x)         of the normal distribution
//     gelu_tanh  x (1 + t) / 2                        (1 + t) / 2 + x (1 - t^2) u' / 2
//                with t = tanh u, u = sqrt(2 / pi) (x + 0.044715 x^3)
//     silu       x s                                  s (1 + x (1 - s)),  s = 1 / (1 + exp(-x))
//
// Infinities and NaN come out as from torch's kernels, which compute the same terms.
#pragma once

#include "kernels.h"
#include "math.h"

namespace fastattn::FASTATTN_ISA {

// activation(x), and grad times its derivative at x. What is not used is not computed: the functions are inlined.
struct Activated {
    Vec value, grad;
};

template <Activation kActivation>
FASTATTN_INLINE Activated activate(Vec x, Vec grad) {
    if constexpr (kActivation == Activation::kRelu) {
        // Selected, not multiplied: grad is dropped where it is infinite, too. NaN in x passes value and grad.
        return {max(Vec{}, x), select(x <= Vec{}, Vec{}, grad)};
    } else if constexpr (kActivation == Activation::kGelu) {
        const Vec cdf = normal_cdf(x);
        const Vec density = exp(x * x * -0.5f) * 0.398942280401432678f;
        return {x * cdf, grad * (cdf + x * density)};
    } else if constexpr (kActivation == Activation::kGeluTanh) {
        constexpr float kSlope = 0.797884560802865356f, kCubic = 0.044715f;
        const Vec square = x * x;
        const Vec t = tanh(kSlope * (x + kCubic * (square * x)));
        const Vec half = 0.5f * x, slope = kSlope * (1.0f + 3.0f * kCubic * square);
        return {half * (1.0f + t), grad * (0.5f * (1.0f + t) + half * (1.0f - t * t) * slope)};
    } else if constexpr (kActivation == Activation::kSilu) {
        const Vec denominator = 1.0f + exp(-x), sigmoid = 1.0f / denominator;
        return {x / denominator, grad * (sigmoid * (1.0f + x * (1.0f - sigmoid)))};
    } else {
        return {x, grad};
    }
}

template <Activation kActivation>
FASTATTN_INLINE Vec activate(Vec x) {
    return activate<kActivation>(x, x).value;
}

template <Activation kActivation>
struct ActivationTag {
    static constexpr Activation value = kActivation;
};

// Calls run(ActivationTag<activation>{}).
template <class Run>
inline void with_activation(Activation activation, const Run& run) {
    switch (activation) {
        case Activation::kNone:
            return run(ActivationTag<Activation::kNone>{});
        case Activation::kRelu:
            return run(ActivationTag<Activation::kRelu>{});
        case Activation::kGelu:
            return run(ActivationTag<Activation::kGelu>{});
        case Activation::kGeluTanh:
            return run(ActivationTag<Activation::kGeluTanh>{});
        case Activation::kSilu:
            return run(ActivationTag<Activation::kSilu>{});
    }
}

}  // namespace fastattn::FASTATTN_ISA
