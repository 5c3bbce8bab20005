// The gradient of a floating mask: that of the scores, summed over the mask's broadcast dimensions.
//
// Tasks run at the same time only if they add to different elements, so every sum has one order. Tasks that share a
// batch-broadcast or head-broadcast mask run one after the other, in phases, and a task has all heads of its queries;
// parts of a head's queries that share a query-broadcast mask add to copies of their own, which are added up at the
// end. A mask that is constant along the keys shifts a row's scores: out does not change, lse does by as much, so its
// gradient is the sum of grad_lse, without any rounding of terms that cancel.
#pragma once

#include "parallel.h"
#include "sequence.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// Where one task adds. The sums lie in the mask's shape, contiguous, in float32.
class MaskSums {
  public:
    MaskSums(const Tensor& mask, float* sums, float* columns) : mask_(mask), sums_(sums), columns_(columns) {}

    // The gradients of query i's scores of keys begin … end - 1, in a block of keys from j0 on.
    void add_row(int64_t b, int64_t h, int64_t i, int64_t j0, int64_t begin, int64_t end, const float* grads) {
        if (mask_.size[3] == 1) return;
        float* to = mask_.size[2] == 1 ? columns_ + (begin - j0) : sums_ + offset(b, h, i) + begin;
        add(grads, end - begin, to);
    }

    // A block's sums over its queries are added to those of the blocks before.
    void finish_block(int64_t b, int64_t h, int64_t j0, int64_t count) {
        if (mask_.size[2] != 1 || mask_.size[3] == 1) return;
        add(columns_, count, sums_ + offset(b, h, 0) + j0);
        for (int64_t c = 0; c < count; ++c) columns_[c] = 0.0f;
    }

    // A row's share of a mask that is constant along the keys.
    void add_constant(int64_t b, int64_t h, int64_t i, float grad) {
        if (mask_.size[3] == 1) sums_[offset(b, h, i)] += grad;
    }

  private:
    int64_t offset(int64_t b, int64_t h, int64_t i) const {
        const int64_t* size = mask_.size;
        return (((size[0] == 1 ? 0 : b) * size[1] + (size[1] == 1 ? 0 : h)) * size[2] + (size[2] == 1 ? 0 : i)) *
               size[3];
    }

    static void add(const float* from, int64_t count, float* to) {
        int64_t c = 0;
        for (; c + kLanes <= count; c += kLanes) store(to + c, load(to + c) + load(from + c));
        for (; c < count; ++c) to[c] += from[c];
    }

    const Tensor& mask_;
    float *sums_, *columns_;
};

class MaskGradient {
  public:
    MaskGradient(const AttentionBackward& args, int64_t parts)
        : gradient_(args.grad_mask),
          count_(gradient_.numel()),
          copies_(gradient_.present() && gradient_.size[2] == 1 ? parts : 1),
          in_place_(copies_ == 1 && gradient_.dtype == DType::kFloat32 && gradient_.contiguous()),
          scratch_(in_place_ ? 0 : count_ * copies_),
          sums_(in_place_ ? gradient_.as<float>() : scratch_.get()) {
        for_slices(count_ * copies_, kSlice, [&](int64_t begin, int64_t end) {
            for (int64_t x = begin; x < end; ++x) sums_[x] = 0.0f;
        });
    }

    bool wanted() const { return gradient_.present(); }

    // `columns`: scratch of a block's keys, zeros.
    MaskSums of_part(int64_t part, float* columns) const {
        return {gradient_, sums_ + (copies_ == 1 ? 0 : part * count_), columns};
    }

    // Adds up the copies and writes the gradient.
    void finish() const {
        if (in_place_ || count_ == 0) return;
        if (gradient_.dtype == DType::kFloat32) write<float>();
        if (gradient_.dtype == DType::kBFloat16) write<BFloat16>();
        if (gradient_.dtype == DType::kFloat16) write<Half>();
    }

  private:
    static constexpr int64_t kSlice = 1 << 15;  // elements of a task

    template <class Body>
    static void for_slices(int64_t count, int64_t slice, const Body& body) {
        parallel_for(ceil_div(count, slice),
                     [&](int64_t task, int) { body(task * slice, smaller(count, (task + 1) * slice)); });
    }

    template <class T>
    void write() const {
        const int64_t *size = gradient_.size, *stride = gradient_.stride;
        const int64_t columns = size[3];
        for_slices(count_ / columns, ceil_div(kSlice, columns), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const int64_t matrix = row / size[2];
                T* to = gradient_.as<T>() + matrix / size[1] * stride[0] + matrix % size[1] * stride[1] +
                        row % size[2] * stride[2];
                for (int64_t c = 0; c < columns; ++c) {
                    float sum = sums_[row * columns + c];
                    for (int64_t copy = 1; copy < copies_; ++copy) sum += sums_[copy * count_ + row * columns + c];
                    from_float(sum, to[c * stride[3]]);
                }
            }
        });
    }

    const Tensor& gradient_;
    const int64_t count_, copies_;
    const bool in_place_;
    const Scratch<float> scratch_;
    float* const sums_;
};

}  // namespace fastattn::FASTATTN_ISA
