// The passes for any processor of the compiler's default target.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "passes.h"

namespace largebatch {
#include "vectors.h"
#include "passes.inc"

const Passes passes_portable{"portable", first, second, square_sum};
}  // namespace largebatch
