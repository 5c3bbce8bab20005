// Masks that hide nothing but padding become ranges of keys.
//
// A mask that is the same for all heads and queries of a sequence, and lets one stretch of keys through (True, or 0 beside
// -inf), says where the sequence begins and ends. As a range it costs nothing: keys beyond it are never read, and no
// score is looked up in a mask. Any other mask stays what it is.
#pragma once

#include <string.h>

#include <type_traits>

#include "parallel.h"
#include "sequence.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

namespace detail {

FASTATTN_INLINE bool lets_through(uint8_t mask) { return mask != 0; }
template <class T>
FASTATTN_INLINE bool lets_through(T mask) {
    return to_float(mask) == 0.0f;
}
FASTATTN_INLINE bool plain_value(uint8_t) { return true; }
template <class T>
FASTATTN_INLINE bool plain_value(T mask) {
    const float value = to_float(mask);
    return value == 0.0f || value == -kInfinity;
}

// Whether all queries have the row of the first.
template <class T>
inline bool same_for_all_queries(const Tensor& mask, const T* first) {
    if (mask.size[2] == 1 || mask.stride[2] == 0) return true;
    if (mask.stride[3] != 1) return false;
    for (int64_t i = 1; i < mask.size[2]; ++i) {
        if (memcmp(first + i * mask.stride[2], first, mask.size[3] * sizeof(T)) != 0) return false;
    }
    return true;
}

// Whether the first `count` elements are one stretch of keys that take part, between others that do not.
template <class T>
inline bool find_stretch(const T* row, int64_t stride, int64_t count, int32_t* begin_and_end) {
    int64_t j = 0;
    const auto run = [&](bool through) {
        while (j < count && plain_value(row[j * stride]) && lets_through(row[j * stride]) == through) ++j;
        return static_cast<int32_t>(j);
    };
    begin_and_end[0] = run(false);
    begin_and_end[1] = run(true);
    return run(false) == count;
}

template <class T>
inline bool find_stretches(const Tensor& mask, int64_t batch, int32_t* ranges) {
    for (int64_t b = 0; b < batch; ++b, ranges += 2) {
        const T* row = mask.as<T>() + (mask.size[0] == 1 ? 0 : b * mask.stride[0]);
        if (!same_for_all_queries(mask, row) || !find_stretch(row, mask.stride[3], mask.size[3], ranges)) return false;
    }
    return true;
}

}  // namespace detail

// run(args), or run(the same with key_ranges for the mask).
template <class Args, class Run>
inline void with_padding_as_ranges(const Args& args, bool mask_has_gradient, const Run& run) {
    const Tensor& mask = args.mask;
    if (!mask.present() || mask_has_gradient || mask.size[3] != args.max_k || mask.numel() == 0 ||
        (mask.size[1] != 1 && mask.stride[1] != 0)) {
        return run(args);
    }
    const Scratch<int32_t> ranges(2 * args.batch);
    const auto found = [&](auto* element) {
        return detail::find_stretches<std::remove_pointer_t<decltype(element)>>(mask, args.batch, ranges.get());
    };
    const bool padding = mask.dtype == DType::kBool       ? found(static_cast<uint8_t*>(nullptr))
                         : mask.dtype == DType::kFloat32  ? found(static_cast<float*>(nullptr))
                         : mask.dtype == DType::kBFloat16 ? found(static_cast<BFloat16*>(nullptr))
                                                          : found(static_cast<Half*>(nullptr));
    if (!padding) return run(args);
    Args without = args;
    without.mask = Tensor{};
    without.key_ranges = ranges.get();
    run(without);
}

}  // namespace fastattn::FASTATTN_ISA
