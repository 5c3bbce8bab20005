// What the two ways of multiplying matrices (gemm.h, few_rows.h) share.
#pragma once

#include <string.h>

#include <type_traits>

#include "integers.h"
#include "parallel.h"
#include "row.h"
#include "tile.h"

namespace fastattn::FASTATTN_ISA {

// Element (i, j) at data[i * row + j * column].
template <class T>
struct Matrix {
    const T* data;
    int64_t row, column;

    Matrix from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
    Matrix transposed() const { return {data, column, row}; }
};

template <class T>
inline Matrix<T> matrix_of(const Tensor& tensor) {
    return {tensor.as<T>(), tensor.stride[0], tensor.stride[1]};
}

// What elements are multiplied as: bfloat16 pairs if the machine has them, else float32.
template <class T>
struct Multiplied {
    static constexpr bool kPairs = kBFloat16Pairs && std::is_same_v<T, BFloat16>;
    static constexpr int64_t kSteps = kPairs ? 2 : 1;  // elements a step of depth
    typedef std::conditional_t<kPairs, BFloat16, float> Element;
    typedef std::conditional_t<kPairs, BFloat16Pair, float> Step;
};

// A matrix of C's shape that an epilogue writes. The caches are asked for a tile's part of it before the tile is
// computed: 1.05 to 1.2 times as fast where they do not hold it.
struct Written {
    const char* data = nullptr;    // none
    int64_t row = 0, element = 0;  // bytes

    // Always inlined: GCC 12 takes a function that does nothing but this for one that does nothing.
    FASTATTN_INLINE void ask_for(int64_t first, int64_t rows, int64_t column, int64_t columns) const {
        if (!data) return;
        const char* from = data + first * row + column * element;
        for (int64_t r = 0; r < rows; ++r, from += row) {
            for (int64_t x = 0; x < columns * element; x += 64) __builtin_prefetch(from + x, 1);
        }
    }
};

template <class T>
inline Written written(const T* data, int64_t row) {
    constexpr int64_t kSize = sizeof(T);
    return {reinterpret_cast<const char*>(data), row * kSize, kSize};
}

// The rows of a tensor from `first` on, if it is there.
template <class T>
inline Written written(const Tensor& out, int64_t first = 0) {
    return out.present() ? written(out.as<T>() + first * out.stride[0], out.stride[0]) : Written{};
}

namespace gemm_detail {

// A vector of steps that lie next to each other: all of them, or those of the last `count` elements and zeros.
template <class T>
FASTATTN_INLINE Vec load_steps(const T* from) {
    if constexpr (Multiplied<T>::kPairs) {
        return load(reinterpret_cast<const float*>(from));
    } else {
        return load(from);
    }
}
template <class T>
FASTATTN_INLINE Vec load_last_steps(const T* from, int64_t count) {
    if constexpr (Multiplied<T>::kPairs) {
        T kept[2 * kLanes] = {};
        for (int64_t i = 0; i < count; ++i) kept[i] = from[i];
        return load(reinterpret_cast<const float*>(kept));
    } else {
        return load_partial(from, count);
    }
}

// Multiplications that are worth waking threads for.
FASTATTN_INLINE bool worth_threads(int64_t rows, int64_t columns, int64_t steps) {
    return rows * columns * steps > int64_t{1} << 19;
}

template <class Body>
inline void for_tasks(bool parallel, int64_t tasks, const Body& body) {
    if (parallel) return parallel_for(tasks, body);
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

// What is done with a finished part of C: rows row … row + rows - 1, likewise columns; sums in float32, `stride` apart,
// which may be read up to whole vectors of columns. A pointer and not a template argument, so that the product is
// compiled once for all epilogues.
struct Finish {
    void (*function)(const void* epilogue, int64_t row, int64_t rows, int64_t column, int64_t columns,
                     const float* sums, int64_t stride);
    const void* epilogue;
    bool transposed;  // the parts are of C^T, and are whole blocks, not strips of them
    Written written[2];
};

// A row of A, from `from` on, as elements to multiply next to each other; an odd depth is filled up to a step.
template <class T>
inline void copy_row(const T* from, int64_t stride, int64_t depth, typename Multiplied<T>::Element* to) {
    typedef typename Multiplied<T>::Element Element;
    int64_t d = 0;
    if (stride != 1) {
        for (; d < depth; ++d) {
            if constexpr (std::is_same_v<T, Element>) {
                to[d] = from[d * stride];
            } else {
                to[d] = to_float(from[d * stride]);
            }
        }
    } else if constexpr (std::is_same_v<T, Element>) {
        if (depth > 0) memcpy(to, from, depth * sizeof(Element));  // from may be null where there is nothing
    } else {
        each_vector(0, depth,
                    [&](int64_t i, int, auto lanes) FASTATTN_BODY { store(to + i, load(from + i, lanes), lanes); });
    }
    if (depth % Multiplied<T>::kSteps) from_float(0.0f, to[depth]);
}

}  // namespace gemm_detail
}  // namespace fastattn::FASTATTN_ISA
