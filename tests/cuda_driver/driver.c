/* Stands in for the CUDA driver, libcuda.so.1, where there is no GPU: enough of it for Triton to load kernels and launch them.
 *
 * A launch is written down instead of run: `launched` gives the eight bytes at each of its parameters. A tensor map holds the
 * address of its tensor, so that it can be told from another. See test_triton_launches.py. */
#include <cuda.h>
#include <stdint.h>
#include <string.h>

enum { kMostParameters = 256 };
static int expected;
static uint64_t parameters[kMostParameters];

void expect(int count) { expected = count < kMostParameters ? count : kMostParameters; }
uint64_t launched(int parameter) { return parameters[parameter]; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** given, void** extra) {
    (void)config, (void)function, (void)extra;
    for (int i = 0; i < expected; ++i) memcpy(&parameters[i], given[i], sizeof(uint64_t));
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    (void)type, (void)sizes, (void)steps, (void)interleave, (void)swizzle, (void)promotion, (void)fill;
    /* What the driver's manual asks for. */
    if (rank < 1 || rank > 5 || (uintptr_t)address % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t i = 0; i + 1 < rank; ++i) {
        if (strides[i] % 16 != 0 || strides[i] >= (cuuint64_t)1 << 40) return CUDA_ERROR_INVALID_VALUE;
    }
    for (cuuint32_t i = 0; i < rank; ++i) {
        if (box[i] < 1 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    }
    memset(map, 0, sizeof *map);
    memcpy(map, &address, sizeof address);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    switch (attribute) { /* an H100's */
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = 9;
            break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = 0;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            *value = 232448;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
            *value = 65536;
            break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
            *value = 32;
            break;
        default:
            *value = 132;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    (void)function;
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    (void)attribute;
    memcpy(data, &pointer, sizeof pointer);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    (void)error;
    *text = "refused by the driver that stands in";
    return CUDA_SUCCESS;
}

/* These have nothing to do, and where they give something, anything will do. */
CUresult cuInit(unsigned flags) { return (void)flags, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) { return (void)d, *c = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return (void)context, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return (void)limit, *value = 0, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* m, const void* image) { return (void)image, *m = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule m) { return (void)m, CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus* status) {
    return (void)s, *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) {
    return (void)m, (void)name, *f = (CUfunction)1, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
    return (void)f, (void)a, (void)v, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return (void)f, (void)c, CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction f, const CUlaunchConfig* c) {
    return (void)f, (void)c, *n = 1, CUDA_SUCCESS;
}
