// One instruction set's table of kernels.
#include "kernels.h"

#define FASTATTN_STRING_OF(name) #name
#define FASTATTN_STRING(name) FASTATTN_STRING_OF(name)

namespace fastattn::FASTATTN_ISA {

#define FASTATTN_DECLARE(function, Arguments) void function(const Arguments& args);
FASTATTN_KERNELS(FASTATTN_DECLARE)
#undef FASTATTN_DECLARE

extern const Kernels table;
const Kernels table = {FASTATTN_STRING(FASTATTN_ISA), FASTATTN_LANES,
#define FASTATTN_ENTRY(function, Arguments) function,
                       FASTATTN_KERNELS(FASTATTN_ENTRY)
#undef FASTATTN_ENTRY
};

}  // namespace fastattn::FASTATTN_ISA
