#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>

namespace kf {
namespace {

struct Features {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false;
  bool amx_tile = false, amx_bf16 = false;
  bool ymm_state = false, zmm_state = false, tile_state = false;
};

Features detect() {
  Features f;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  f.fma = c & (1u << 12);
  f.f16c = c & (1u << 29);
  const bool osxsave = c & (1u << 27);
  if (osxsave) {
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    f.ymm_state = (lo & 0x6) == 0x6;
    f.zmm_state = (lo & 0xe6) == 0xe6;
    f.tile_state = (lo & 0x60000) == 0x60000;
  }
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    f.avx2 = b & (1u << 5);
    f.avx512f = b & (1u << 16);
    f.avx512dq = b & (1u << 17);
    f.avx512bw = b & (1u << 30);
    f.avx512vl = b & (1u << 31);
    f.amx_bf16 = d & (1u << 22);
    f.amx_tile = d & (1u << 24);
  }
#endif
  return f;
}

const Features& features() {
  static const Features f = detect();
  return f;
}

// Linux gives the AMX tile registers to a process only on request (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool request_tile_state() {
#if defined(__x86_64__) && defined(SYS_arch_prctl)
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic: return "generic";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::amx: return "amx";
    case Isa::neon: return "neon";
  }
  return "?";
}

std::string isa_refusal(Isa isa) {
  if (isa == Isa::generic) return "";
#if defined(__aarch64__)
  return isa == Isa::neon ? "" : "this build is not for x86-64";
#elif !defined(__x86_64__)
  return isa == Isa::neon ? "this build is not for 64-bit ARM" : "this build is not for x86-64";
#else
  if (isa == Isa::neon) return "this build is not for 64-bit ARM";
  const Features& f = features();
  if (!(f.avx2 && f.fma && f.f16c)) return "the processor has no AVX2 with FMA and F16C";
  if (!f.ymm_state) return "the operating system does not save the AVX registers";
  if (isa == Isa::avx2) return "";
  if (!(f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq)) return "the processor has no AVX-512 F/BW/VL/DQ";
  if (!f.zmm_state) return "the operating system does not save the AVX-512 registers";
  if (isa == Isa::avx512) return "";
  if (!(f.amx_tile && f.amx_bf16)) return "the processor has no AMX-bf16";
  if (!f.tile_state) return "the operating system does not save the AMX tiles";
  if (!request_tile_state()) return "the operating system refused the AMX tiles to this process";
  return "";
#endif
}

std::vector<std::string> cpu_features() {
  const Features& f = features();
  std::vector<std::string> names;
  const auto add = [&](bool has, const char* name) {
    if (has) names.emplace_back(name);
  };
  add(f.avx2, "avx2");
  add(f.fma, "fma");
  add(f.f16c, "f16c");
  add(f.avx512f, "avx512f");
  add(f.avx512bw, "avx512bw");
  add(f.avx512vl, "avx512vl");
  add(f.avx512dq, "avx512dq");
  add(f.amx_tile, "amx_tile");
  add(f.amx_bf16, "amx_bf16");
#if defined(__aarch64__)
  add(true, "neon");  // a part of the architecture
#endif
  return names;
}

}  // namespace kf
