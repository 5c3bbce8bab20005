// Asks for the query, key and value of a (batch, kv head) before its turn, a few cache lines at a time. Where heads lie
// next to each other in a token, a head's rows are a token apart, and the machine's own prefetching does not find them:
// short sequences would spend a quarter of their time waiting.
#pragma once

#include "sequence.h"

namespace fastattn::FASTATTN_ISA {

class Prefetch {
  public:
    // All of it in `steps` steps.
    Prefetch(const AttentionForward& args, int64_t pair, int64_t steps) {
        if (pair >= args.batch * args.kv_heads) return;
        const int64_t b = pair / args.kv_heads, kv_head = pair % args.kv_heads, group = args.heads / args.kv_heads;
        const Sequence seq = sequence_of(args, b);
        add(args.key, b, kv_head, seq.k_begin, seq.k_len);
        add(args.value, b, kv_head, seq.k_begin, seq.k_len);
        add(args.query, b, kv_head * group, seq.q_begin, seq.q_len);
        if (lines_ <= kMostLines) each_step_ = ceil_div(lines_, larger(steps, 1));
    }

    void step() {
        for (const int64_t end = smaller(lines_, at_ + each_step_); at_ < end; ++at_) {
            const Rows* rows = rows_;
            int64_t line = at_;
            for (; line >= rows->count * rows->lines; ++rows) line -= rows->count * rows->lines;
            __builtin_prefetch(rows->begin + line / rows->lines * rows->stride + line % rows->lines * kLine, 0, 2);
        }
    }

  private:
    static constexpr int64_t kLine = 64;
    static constexpr int64_t kMostLines = (1 << 18) / kLine;  // a quarter of a second-level cache

    struct Rows {
        const char* begin;
        int64_t stride, count, lines;  // stride in bytes; lines of a row
    };

    void add(const Tensor& t, int64_t b, int64_t h, int64_t token, int64_t count) {
        const int64_t size = t.dtype == DType::kFloat32 ? 4 : 2;
        if (t.stride[3] != 1 || count == 0) return;
        rows_[tensors_++] = {t.as<const char>() + offset_of(t, b, h, token) * size, t.stride[2] * size, count,
                             ceil_div(t.size[3] * size, kLine)};
        lines_ += rows_[tensors_ - 1].count * rows_[tensors_ - 1].lines;
    }

    Rows rows_[3];
    int64_t tensors_ = 0, lines_ = 0, at_ = 0, each_step_ = 0;
};

}  // namespace fastattn::FASTATTN_ISA
