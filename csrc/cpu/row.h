// Rows in memory: loops over them in vectors, the last of which may be partial, and their element types.
#pragma once

#include <type_traits>

#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// Which lanes of a vector lie inside the row: all of them, or the first `count`.
struct Full {};
struct Tail {
    int64_t count;
};

template <class T>
inline Vec load(const T* from, Full) {
    return load(from);
}
template <class T>
inline Vec load(const T* from, Tail tail) {  // zeros beyond the row
    return load_partial(from, tail.count);
}
template <class T>
inline void store(T* to, Vec value, Full) {
    store(to, value);
}
template <class T>
inline void store(T* to, Vec value, Tail tail) {
    store_partial(to, value, tail.count);
}
inline Vec inside(Vec value, Full) { return value; }
inline Vec inside(Vec value, Tail tail) { return keep_first(value, tail.count); }

// Outputs so large that no cache holds them until they are read are streamed: a cache would first read what they
// overwrite. They are written in rows of whole cache lines. Still larger ones come fresh from the system (glibc keeps no
// block of 32 MiB and more), and the zeros that it has just written to them are in the caches.
constexpr int64_t kStreamedBytes = int64_t{12} << 20, kFreshBytes = int64_t{32} << 20;

inline bool worth_streaming(const Tensor& out, int64_t row_elements) {
    const int64_t size = element_size(out.dtype), bytes = out.numel() * size;
    return bytes >= kStreamedBytes && bytes < kFreshBytes && row_elements * size % 64 == 0 &&
           reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
}

// A store, or a stream (std::true_type), which has whole vectors only.
template <class T, class Lanes>
FASTATTN_INLINE void put(T* to, Vec value, std::false_type, Lanes lanes) {
    store(to, value, lanes);
}
template <class T>
FASTATTN_INLINE void put(T* to, Vec value, std::true_type, Full) {
    stream(to, value);
}
template <class T>
FASTATTN_INLINE void put(T*, Vec, std::true_type, Tail) {}

// What is left of a vector when its elements are rounded to T.
template <class T>
FASTATTN_INLINE Vec rounded(Vec value) {
    if constexpr (std::is_same_v<T, float>) return value;
    T elements[kLanes];
    store(elements, value);
    return load(elements);
}

#define FASTATTN_BODY __attribute__((always_inline))

// body(i, k, lanes) for each vector of [begin, end): i is its first element, k in 0 … 3 the sum it belongs to, so that
// four additions are under way at a time.
template <class Body>
inline void each_vector(int64_t begin, int64_t end, const Body& body) {
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
        body(i, 0, Full{});
        body(i + kLanes, 1, Full{});
        body(i + 2 * kLanes, 2, Full{});
        body(i + 3 * kLanes, 3, Full{});
    }
    for (; i + kLanes <= end; i += kLanes) body(i, 0, Full{});
    if (i < end) body(i, 0, Tail{end - i});
}

// body(i, lanes) for each vector of [0, count): for long bodies, which the machine overlaps by itself, and which are
// compiled once for each dtype and activation.
template <class Body>
inline void each_vector_in_turn(int64_t count, const Body& body) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) body(i, Full{});
    if (i < count) body(i, Tail{count - i});
}

// A vector of `dim` elements (a weight, a bias) as float32: itself, converted into `space`, or `absent` everywhere.
inline const float* as_float(const Tensor& vector, int64_t dim, float absent, float* space) {
    if (vector.dtype == DType::kFloat32) return vector.as<float>();
    auto convert = [&](auto* from) {
        each_vector(0, dim,
                    [&](int64_t i, int, auto lanes) FASTATTN_BODY { store(space + i, load(from + i, lanes), lanes); });
    };
    if (vector.dtype == DType::kBFloat16) {
        convert(vector.as<BFloat16>());
    } else if (vector.dtype == DType::kFloat16) {
        convert(vector.as<Half>());
    } else {
        for (int64_t i = 0; i < dim; ++i) space[i] = absent;
    }
    return space;
}

// Calls run(T*) with a null pointer of the element type: float32, bfloat16 or float16.
template <class Run>
inline void with_dtype(DType dtype, const Run& run) {
    if (dtype == DType::kFloat32) {
        run(static_cast<float*>(nullptr));
    } else if (dtype == DType::kBFloat16) {
        run(static_cast<BFloat16*>(nullptr));
    } else {
        run(static_cast<Half*>(nullptr));
    }
}

}  // namespace fastattn::FASTATTN_ISA
