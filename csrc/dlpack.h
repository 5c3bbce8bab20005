// Reading a torch.Tensor through DLPack's table of C functions, which torch.Tensor has as `__dlpack_c_exchange_api__`: the
// part of its ABI (version 1) that the bindings use. Ten times as fast as asking for attributes through Python.
#pragma once

#include <cstdint>

namespace fastattn {

enum DLPackDevice : int32_t { kDLCPU = 1, kDLCUDAHost = 3 };  // the latter is pinned memory, the CPU's too
enum DLPackCode : uint8_t { kDLInt = 0, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

// Lives as long as the tensor that it was read from.
struct DLPackTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;  // strides in elements
    uint64_t byte_offset;
};

struct DLPackExchange {
    uint32_t major, minor;
    DLPackExchange* previous;
    void* unused[3];
    int (*read)(void* object, DLPackTensor* tensor);  // 0, or -1 with a Python exception; nothing is allocated
};

}  // namespace fastattn
