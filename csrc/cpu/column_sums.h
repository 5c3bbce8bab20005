// Sums over the rows of a matrix, for gradients of vectors that every row shares (a bias, a norm's weight).
//
//     rows of a part ──► block sums (columns) ──► part sums (columns) ──► gradient
//
// The rows are cut into parts by the shape alone (never by the number of threads), each part adds its rows to sums of
// its own, in blocks of about the square root of their number for accuracy, and the parts are added in order at the
// end.
#pragma once

#include <type_traits>

#include "integers.h"
#include "parallel.h"
#include "row.h"

namespace fastattn::FASTATTN_ISA {

class ColumnSums {
  public:
    // `columns` sums over `rows` rows, each of which is work on `row_elements` elements.
    ColumnSums(int64_t rows, int64_t columns, int64_t row_elements)
        : rows_(rows),
          columns_(columns),
          part_rows_(larger(ceil_div(rows, kMostParts), larger(kPartElements / larger(row_elements, 1), 1))),
          parts_(larger(ceil_div(rows, part_rows_), 1)),
          sums_(2 * columns, static_cast<int>(parts_)) {}

    int64_t parts() const { return parts_; }  // the tasks of add_rows

    // add_row(row, thread, sums) for every row, in parallel: adds the row's terms to sums[0 … columns - 1].
    template <class AddRow>
    void add_rows(const AddRow& add_row) const {
        add_row_groups(1, [&](int64_t row, int64_t, int thread, float* sums) { add_row(row, thread, sums); });
    }

    // The same with add_group(row, count, thread, sums): for rows row … row + count - 1, `most` of them where there are
    // as many. `most` divides 16.
    template <class AddGroup>
    void add_row_groups(int64_t most, const AddGroup& add_group) const {
        int64_t block_rows = 16;
        while (block_rows * block_rows < part_rows_) block_rows *= 2;
        parallel_for(parts_, [&](int64_t part, int thread) {
            float* of_part = of(part);
            float* of_block = of_part + columns_;
            for (int64_t i = 0; i < 2 * columns_; ++i) of_part[i] = 0.0f;
            const int64_t begin = part * part_rows_, end = smaller(begin + part_rows_, rows_);
            for (int64_t row = begin; row < end; row += most) {
                add_group(row, smaller(most, end - row), thread, of_block);
                if ((row - begin) % block_rows == block_rows - most) flush(of_block, of_part, columns_);
            }
            flush(of_block, of_part, columns_);
        });
    }

    // Then the sums from `first` on, as the elements of a contiguous vector; an absent one is left out. Once for each
    // sum.
    void write(const Tensor& gradient, int64_t first = 0) const {
        if (!gradient.present()) return;
        constexpr int64_t kColumns = 512;
        const int64_t count = gradient.size[0];
        with_dtype(gradient.dtype, [&](auto* element) {
            auto* to = gradient.as<std::remove_pointer_t<decltype(element)>>();
            parallel_for(ceil_div(count, kColumns), [&](int64_t task, int) {
                const int64_t begin = task * kColumns, end = smaller(begin + kColumns, count);
                float* total = of(0) + first;
                for (int64_t part = 1; part < parts_; ++part) {
                    flush(of(part) + first + begin, total + begin, end - begin);
                }
                each_vector(begin, end, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
                    store(to + i, load(total + i, lanes), lanes);
                });
            });
        });
    }

  private:
    static constexpr int64_t kMostParts = 64;
    static constexpr int64_t kPartElements = 1 << 15;

    float* of(int64_t part) const { return sums_.of(static_cast<int>(part)); }

    // to += from, and from = 0.
    static void flush(float* from, float* to, int64_t count) {
        each_vector(0, count, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
            store(to + i, load(to + i, lanes) + load(from + i, lanes), lanes);
            store(from + i, Vec{}, lanes);
        });
    }

    int64_t rows_, columns_, part_rows_, parts_;
    Scratch<float> sums_;  // of each part: its sums, then those of the block under way
};

}  // namespace fastattn::FASTATTN_ISA
