#include "kernel_table.h"

#include <atomic>

#include "../common/error.h"

namespace kf::cpu {
namespace {

bool in_build(Isa isa) {
  switch (isa) {
#if defined(KF_ISA_AVX2)
    case Isa::avx2: return true;
#endif
#if defined(KF_ISA_AVX512)
    case Isa::avx512: return true;
#endif
#if defined(KF_ISA_AMX) && defined(KF_ISA_AVX512)
    case Isa::amx: return true;
#endif
#if defined(KF_ISA_NEON)
    case Isa::neon: return true;
#endif
    case Isa::generic: return true;
    default: return false;
  }
}

Isa widest() {
  for (Isa isa : {Isa::amx, Isa::avx512, Isa::avx2, Isa::neon}) {
    if (refusal(isa).empty()) return isa;
  }
  return Isa::generic;
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa{static_cast<int>(widest())};
  return isa;
}

}  // namespace

std::string refusal(Isa isa) {
  const std::string reason = isa_refusal(isa);
  return reason.empty() && !in_build(isa) ? "the compiler of this build does not know it" : reason;
}

Isa active_isa() { return static_cast<Isa>(chosen().load()); }

const KernelTable& active_table() {
  switch (active_isa()) {
#if defined(KF_ISA_AVX2)
    case Isa::avx2: return avx2_table();
#endif
#if defined(KF_ISA_AVX512)
    case Isa::avx512: return avx512_table();
#endif
#if defined(KF_ISA_AMX) && defined(KF_ISA_AVX512)
    case Isa::amx: return amx_table();
#endif
#if defined(KF_ISA_NEON)
    case Isa::neon: return neon_table();
#endif
    default: return generic_table();
  }
}

void select_isa(Isa isa) {
  const std::string reason = refusal(isa);
  require(reason.empty(), std::string("isa ") + isa_name(isa) + " cannot be used: " + reason);
  chosen().store(static_cast<int>(isa));
}

}  // namespace kf::cpu
