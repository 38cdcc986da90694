// Left to itself the compiler keeps sums in memory where it does not inline what takes their address, and drops the call of a
// function that does nothing but ask for memory.
#pragma once

#define LARGEBATCH_INLINE __attribute__((always_inline)) inline
