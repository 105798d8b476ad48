// The bodies on AVX2; setup.py gives this file, and no other, its flags.
// Nothing with external linkage is defined here but the table: inline functions shared with other files would let the
// linker keep this file's copy for everyone.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernel_table.h"

#define KF_VECTOR_BYTES 32

namespace kf::cpu {
namespace {

#include "vector_math.inl"
#include "lower_tile.inl"
#include "symmetric_rank_k_update_impl.inl"
#include "rank_k_update_impl.inl"

}  // namespace

const KernelTable& avx2_table() {
  static const KernelTable table = {SymmetricBody<float>::kernel(),
                                    SymmetricBody<double>::kernel(),
                                    {},
                                    RankKBody<float>::kernel(),
                                    RankKBody<double>::kernel()};
  return table;
}

}  // namespace kf::cpu
