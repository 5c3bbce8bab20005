// What a kernel knows of a tensor: its memory, dtype, sizes and strides. Plain data, the same for every instruction
// set.
#pragma once

#include <stdint.h>

// Code here is compiled for several instruction sets under one name, and the linker keeps one copy of a function: so
// there must be none outside of its callers. The same holds for any function outside of namespace
// fastattn::FASTATTN_ISA.
#define FASTATTN_INLINE inline __attribute__((always_inline))

namespace fastattn {

enum class DType : int32_t { kAbsent, kFloat32, kBFloat16, kFloat16, kFloat64, kInt32, kInt64, kBool };

constexpr int64_t element_size(DType dtype) {
    switch (dtype) {
        case DType::kFloat64:
        case DType::kInt64:
            return 8;
        case DType::kFloat32:
        case DType::kInt32:
            return 4;
        case DType::kBFloat16:
        case DType::kFloat16:
            return 2;
        default:
            return 1;
    }
}

// The 16-bit floating types as they lie in memory; simd.h converts them.
struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

constexpr int kMaxRank = 8;

// Sizes and strides count elements. An absent tensor (Python's None) has dtype kAbsent and no data; a tensor without
// elements is present, and its data may be null.
struct Tensor {
    void* data = nullptr;
    DType dtype = DType::kAbsent;
    int rank = 0;
    int64_t size[kMaxRank] = {};
    int64_t stride[kMaxRank] = {};

    FASTATTN_INLINE bool present() const { return dtype != DType::kAbsent; }

    template <class T>
    FASTATTN_INLINE T* as() const {
        return static_cast<T*>(data);
    }

    FASTATTN_INLINE int64_t numel() const {
        int64_t count = present() ? 1 : 0;
        for (int i = 0; i < rank; ++i) count *= size[i];
        return count;
    }

    // Row-major without gaps. The stride of a dimension of size 1 does not matter, nor any where there are no elements.
    FASTATTN_INLINE bool contiguous() const {
        if (numel() == 0) return true;
        int64_t expected = 1;
        for (int i = rank - 1; i >= 0; --i) {
            if (size[i] != 1 && stride[i] != expected) return false;
            expected *= size[i];
        }
        return true;
    }

    // Whether the elements of the last dimension lie next to each other. As above, no elements always do.
    FASTATTN_INLINE bool unit_last_stride() const {
        return rank == 0 || size[rank - 1] <= 1 || stride[rank - 1] == 1 || numel() == 0;
    }
};

}  // namespace fastattn
