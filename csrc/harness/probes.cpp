#include "harness/probes.h"

#include <cstring>

namespace lwft {

#define X(level)              \
  namespace level {           \
  extern const Probes probes; \
  }
LWFT_ISA_LEVELS
#undef X

const Probes* find_probes(const char* isa) {
#define X(level) \
  if (std::strcmp(isa, #level) == 0) return &level::probes;
  LWFT_ISA_LEVELS
#undef X
  return nullptr;
}

}  // namespace lwft
