// What kernels and bindings ask of the process they run in. Defined in process.cpp, once for all instruction sets.
#pragma once

#include <stddef.h>

namespace fastattn {

// Aligned to 64 bytes. Throws std::bad_alloc.
void* scratch_allocate(size_t bytes);
void scratch_free(void* memory);

// Asks for huge pages under memory that is about to be filled, if it is large enough for any: a hint, without which
// nothing changes but the time.
void use_huge_pages(void* memory, size_t bytes);

// Whether this process was forked from one with threads. OpenMP would wait forever for them: they do not come along.
bool threads_lost();

}  // namespace fastattn
