// The passes for any processor of the compiler's default target.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "passes.h"

namespace largebatch {
#include "vectors.h"
#include "passes.inc"

const Passes* passes_portable() {
  static const Passes passes{"portable", first, second, square_sum};
  return &passes;
}

}  // namespace largebatch
