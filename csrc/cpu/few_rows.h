// The product of a few rows by a matrix whose columns lie along the depth (a linear layer's weight, on a few tokens):
//
//     C (rows x columns)  =  A (rows x depth) . B (depth x columns)           by dot products, B read once as it lies
//
//            columns of B, along the depth      Tile: kDotRows x kDotColumns dot products, each in a vector's lanes:
//              ═════════ ═════════ ═══  …       a vector of each row and column is loaded for kDotRows * kDotColumns
//     row      | . . . | | . . . | | . …        multiply-adds. All rows pass by a group of columns before the next, so
//     of A ═══ sums      sums      sums         B comes from memory once; A, copied, stays in the first-level cache.
//                                               A single row takes twice the columns: four sums would wait for another.
//                                               Several rows ask for the next group's columns while the first of them
//                                               pass by this one's: 1.05 to 1.5 times as fast.
//
// Columns up to a page, by one or two rows, are taken one after the other, kAlong vectors at a time: B then is read from
// its beginning to its end, which the processor foresees, 1.2 to 1.5 times as fast as side by side.
//
// A task is a stretch of columns. Sums over more than kDotChain vectors are made in parts, for accuracy.
//
// Must read B once: for a few rows that, not the 2 rows columns depth flops, is what takes the time.
#pragma once

#include "matrix.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kFewRows = 8;

namespace gemm_detail {

constexpr int kDotRows = kLanes == 16 ? 4 : 2, kDotColumns = 4, kOneRowColumns = 8;
constexpr int kShortRows = 2, kAlong = 4;
constexpr int64_t kDotChain = 64, kShortBytes = 4096, kBytesAhead = 12 << 10;

// sums[r * stride + j] = row r of A (whole vectors, `a_row` steps apart) times column j of B, for the first `columns`
// of kColumns columns. `ahead` of them, in elements, lie the columns that come next; 0 where they need not be asked for.
template <class T, int kRows, int kColumns>
__attribute__((noinline)) void dot_products(int rows, int64_t depth, const typename Multiplied<T>::Step* a,
                                            int64_t a_row, const T* b, int64_t b_column, int columns, int64_t ahead,
                                            float* sums, int64_t stride) {
    if constexpr (kRows > 1) {
        if (rows < kRows) {
            return dot_products<T, kRows - 1, kColumns>(rows, depth, a, a_row, b, b_column, columns, ahead, sums,
                                                        stride);
        }
    }
    constexpr int64_t kElements = kLanes * Multiplied<T>::kSteps;  // a vector
    const T* column[kColumns];
    for (int j = 0; j < kColumns; ++j) column[j] = b + (j < columns ? j : 0) * b_column;
    Vec total[kRows][kColumns] = {};
    for (int64_t begin = 0; begin < depth; begin += kDotChain * kElements) {
        const int64_t end = smaller(begin + kDotChain * kElements, depth);
        Vec sum[kRows][kColumns] = {};
        auto add = [&](int64_t d, auto load_b) FASTATTN_BODY {
            Vec right[kColumns];  // what is not unrolled stands in memory, the sums too
#pragma GCC unroll 8
            for (int j = 0; j < kColumns; ++j) right[j] = load_b(column[j] + d);
#pragma GCC unroll 8
            for (int j = 0; j < kColumns; ++j) __builtin_prefetch(column[j] + d + ahead);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const Vec left = detail::load_step(a + r * a_row + d / Multiplied<T>::kSteps);
#pragma GCC unroll 8
                for (int j = 0; j < kColumns; ++j) sum[r][j] = detail::add_product(sum[r][j], a, left, right[j]);
            }
        };
        int64_t d = begin;
        for (; d + kElements <= end; d += kElements)
            add(d, [](const T* from) FASTATTN_BODY { return load_steps(from); });
        if (d < end) {
            const int64_t count = end - d;
            add(d, [count](const T* from) FASTATTN_BODY { return load_last_steps(from, count); });
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
            for (int j = 0; j < kColumns; ++j) total[r][j] += sum[r][j];
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int j = 0; j < columns; ++j) sums[r * stride + j] = reduce_add(total[r][j]);
    }
}

// The same for columns of at most kShortBytes, any number of them, one after the other. kAlong vectors along the depth have
// sums of their own.
template <class T, int kRows>
__attribute__((noinline)) void short_dot_products(int64_t depth, const typename Multiplied<T>::Step* a, int64_t a_row,
                                                  const T* b, int64_t b_column, int64_t columns, float* sums,
                                                  int64_t stride) {
    constexpr int64_t kElements = kLanes * Multiplied<T>::kSteps, kStride = kAlong * kElements;
    const int64_t columns_ahead = ceil_div(kBytesAhead, larger(b_column, int64_t{1}) * static_cast<int64_t>(sizeof(T)));
    const int64_t in_fours = depth / kStride * kStride, whole = depth / kElements * kElements;
    for (int64_t c = 0; c < columns; ++c) {
        const T* column = b + c * b_column;
        const int64_t ahead = c + columns_ahead < columns ? columns_ahead * b_column : 0;
        Vec sum[kAlong][kRows] = {};
        auto add = [&](int64_t d, int v, Vec right) FASTATTN_BODY {
            __builtin_prefetch(column + d + ahead);
#pragma GCC unroll 2
            for (int r = 0; r < kRows; ++r) {
                const Vec left = detail::load_step(a + r * a_row + d / Multiplied<T>::kSteps);
                sum[v][r] = detail::add_product(sum[v][r], a, left, right);
            }
        };
        for (int64_t d = 0; d < in_fours; d += kStride) {
#pragma GCC unroll 4
            for (int v = 0; v < kAlong; ++v) add(d + v * kElements, v, load_steps(column + d + v * kElements));
        }
        for (int64_t d = in_fours; d < whole; d += kElements) add(d, 0, load_steps(column + d));
        if (whole < depth) add(whole, 1, load_last_steps(column + whole, depth - whole));
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
            sums[r * stride + c] = reduce_add((sum[0][r] + sum[1][r]) + (sum[2][r] + sum[3][r]));
        }
    }
}

template <class T>
inline void few_rows(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, Matrix<T> b, const Finish& finish) {
    typedef typename Multiplied<T>::Element Element;
    typedef typename Multiplied<T>::Step Step;
    constexpr int64_t kSteps = Multiplied<T>::kSteps, kMostTasks = 64, kLeastStretch = 64;
    const int64_t a_row = round_up(ceil_div(depth, kSteps), kLanes);
    const Scratch<Step> copied(rows * a_row);
    for (int64_t r = 0; r < rows; ++r) {
        Step* to = copied.get() + r * a_row;
        for (int64_t s = depth / kSteps; s < a_row; ++s) to[s] = Step{};
        copy_row(a.from(r, 0).data, a.column, depth, reinterpret_cast<Element*>(to));
    }
    const int64_t stretch = round_up(larger(ceil_div(columns, kMostTasks), kLeastStretch), kLanes);
    const int64_t tasks = ceil_div(columns, stretch);
    const bool parallel = worth_threads(rows, columns, ceil_div(depth, kSteps));
    const Scratch<float> sums(rows * stretch, parallel ? thread_count(tasks) : 1);
    const bool one_by_one = rows <= kShortRows && depth * static_cast<int64_t>(sizeof(T)) <= kShortBytes;
    for_tasks(parallel, tasks, [&](int64_t task, int thread) {
        const int64_t first = task * stretch, count = smaller(stretch, columns - first);
        float* to = sums.of(thread);
        if (one_by_one) {
            const auto dots = rows == 1 ? short_dot_products<T, 1> : short_dot_products<T, kShortRows>;
            dots(depth, copied.get(), a_row, b.from(0, first).data, b.column, count, to, stretch);
        }
        for (int64_t c = 0; !one_by_one && rows == 1 && c < count; c += kOneRowColumns) {
            const int64_t ahead = c + 2 * kOneRowColumns <= count ? kOneRowColumns * b.column : 0;
            dot_products<T, 1, kOneRowColumns>(1, depth, copied.get(), a_row, b.from(0, first + c).data, b.column,
                                               static_cast<int>(smaller(kOneRowColumns, count - c)), ahead, to + c,
                                               stretch);
        }
        for (int64_t c = 0; !one_by_one && rows > 1 && c < count; c += kDotColumns) {
            const int some = static_cast<int>(smaller(kDotColumns, count - c));
            const int64_t ahead = c + 2 * kDotColumns <= count ? kDotColumns * b.column : 0;
            for (int64_t r = 0; r < rows; r += kDotRows) {
                dot_products<T, kDotRows, kDotColumns>(
                    static_cast<int>(smaller(kDotRows, rows - r)), depth, copied.get() + r * a_row, a_row,
                    b.from(0, first + c).data, b.column, some, r == 0 ? ahead : 0, to + r * stretch + c, stretch);
            }
        }
        finish.function(finish.epilogue, 0, rows, first, count, to, stretch);
    });
}

}  // namespace gemm_detail
}  // namespace fastattn::FASTATTN_ISA
