#include "kernel_table.h"

#include <atomic>

#include "../common/error.h"

namespace kf::cpu {
namespace {

std::atomic<int>& chosen() {
  static std::atomic<int> isa{static_cast<int>(best_isa())};
  return isa;
}

}  // namespace

Isa active_isa() { return static_cast<Isa>(chosen().load()); }

const KernelTable& active_table() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::avx2: return avx2_table();
    case Isa::avx512: return avx512_table();
    case Isa::amx: return amx_table();
#endif
    default: return generic_table();
  }
}

void select_isa(Isa isa) {
  const std::string refusal = isa_refusal(isa);
  require(refusal.empty(), std::string("isa ") + isa_name(isa) + " cannot be used: " + refusal);
  chosen().store(static_cast<int>(isa));
}

}  // namespace kf::cpu
