// What the bindings that turn queries and keys check alike.
#pragma once

#include "bindings.h"

namespace fastattn {

// The angles of `batch` sequences of `seq` tokens with heads of `head_dim`: cos and sin, (seq, rotary_dim) or (batch or 1, 1,
// seq, rotary_dim), both become (batch, seq, rotary_dim).
void read_angles(Tensor& cos, Tensor& sin, int64_t batch, int64_t seq, int64_t head_dim);

}  // namespace fastattn
