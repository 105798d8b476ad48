// Which instruction sets this processor and this operating system allow.
#pragma once
#include <string>
#include <vector>

namespace kf {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2, amx = 3, neon = 4 };

const char* isa_name(Isa isa);

// Empty when `isa` may be used here, otherwise why not. Asks the kernel for the AMX tile state when needed.
std::string isa_refusal(Isa isa);

// Names of the processor features the kernels look at, e.g. "avx2", "amx_bf16".
std::vector<std::string> cpu_features();

}  // namespace kf
