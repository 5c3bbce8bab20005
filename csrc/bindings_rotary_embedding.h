// What rotary_embedding and the attention that turns its new tokens check alike.
#pragma once

#include "bindings.h"

namespace fastattn {

struct Angles {
    Tensor cos, sin;  // (batch, seq, rotary_dim)
};

// (seq, rotary_dim), (batch or 1, seq, rotary_dim) or (batch or 1, 1, seq, rotary_dim), of any floating dtypes, as what
// kernels take; x is (batch, heads, seq, head_dim).
Angles read_angles(const Tensor& cos, const Tensor& sin, const Tensor& x);

// That they lie along their last dimension in memory.
void check_unit_last_stride(const Angles& angles);

}  // namespace fastattn
