// Which instruction set's kernels run: chosen once by cpuid, or by name. Compiled once, for any machine.
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#    include <cpuid.h>
#endif
#ifdef __linux__
#    include <sys/syscall.h>
#    include <unistd.h>
#endif

#include <atomic>
#include <stdexcept>
#include <string>

#include "built_isas.h"  // FASTATTN_FOR_EACH_ISA, written by setup.py
#include "kernels.h"

namespace fastattn {

#define FASTATTN_DECLARE_TABLE(isa) \
    namespace isa {                 \
    extern const Kernels table;     \
    }
FASTATTN_FOR_EACH_ISA(FASTATTN_DECLARE_TABLE)
#undef FASTATTN_DECLARE_TABLE

namespace {

// Best first; emulated ones come after the portable one, so that nothing but their name selects them.
constexpr const char* kPreference[] = {"amx",      "avx512_bf16",      "avx512",      "avx2",
                                       "portable", "emulated512_bf16", "emulated512", "emulated_amx"};

#if defined(__x86_64__)
// The processor has the matrix unit, and Linux lets this process use it: its registers are 8 KiB that a thread's
// context does not hold unless that was asked for, once for all threads.
bool matrix_unit() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
    if (!(d & kBFloat16) || !(d & kTiles)) return false;
#    ifdef __linux__
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#    else
    return false;
#    endif
}
#endif

bool machine_runs(const char* isa) {
    if (strcmp(isa, "portable") == 0) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool amx = strcmp(isa, "amx") == 0;
    if (strncmp(isa, "avx512", 6) != 0 && !amx) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (strcmp(isa, "avx512") == 0) return avx512;
    return avx512 && __builtin_cpu_supports("avx512bf16") && (!amx || matrix_unit());
#else
    return false;
#endif
}

const Kernels* built_table(const char* name) {
#define FASTATTN_TRY_TABLE(isa) \
    if (strcmp(name, #isa) == 0) return &isa::table;
    FASTATTN_FOR_EACH_ISA(FASTATTN_TRY_TABLE)
#undef FASTATTN_TRY_TABLE
    return nullptr;
}

const Kernels& table_named(const char* name) {
    for (int i = 0; const char* usable = usable_isa(i); ++i) {
        if (strcmp(usable, name) == 0) return *built_table(name);
    }
    std::string message = std::string("the CPU instruction set '") + name + "' cannot be used here: ";
    message += built_table(name) ? "this machine does not have it" : "this build does not hold it";
    message += "; choose one of";
    for (int i = 0; const char* usable = usable_isa(i); ++i) message += (i ? ", " : " ") + std::string(usable);
    throw std::invalid_argument(message);
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const char* usable_isa(int i) {
    for (const char* name : kPreference) {
        if (built_table(name) && machine_runs(name) && i-- == 0) return name;
    }
    return nullptr;
}

const Kernels& kernels() {
    const Kernels* table = in_use.load(std::memory_order_acquire);
    if (table) return *table;
    const char* asked = getenv("FASTATTN_CPU_ISA");
    const char* best = usable_isa(0);
    if (!asked && !best) {
        throw std::invalid_argument("this build holds no CPU instruction set that this machine has; build it here");
    }
    table = &table_named(asked && *asked ? asked : best);
    in_use.store(table, std::memory_order_release);
    return *table;
}

void select_isa(const char* name) { in_use.store(&table_named(name), std::memory_order_release); }

}  // namespace fastattn
