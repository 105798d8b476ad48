// One instruction set's table: an isa_*.cpp sets KF_VECTOR_BYTES and KF_TABLE and includes this.
// Nothing with external linkage is defined here but the table: inline functions shared with other files would let the
// linker keep a wide instruction set's copy for everyone.
#include <cstddef>
#include <cstdint>

#include "kernel_table.h"

namespace kf::cpu {
namespace {

#include "vector_math.inl"
#include "lower_tile.inl"
#include "symmetric_rank_k_update_impl.inl"
#include "rank_k_update_impl.inl"
#include "masked_step_impl.inl"
#include "row_products_impl.inl"
#include "rms_norm_impl.inl"
#include "gated_impl.inl"
#include "best_overlap_impl.inl"
#include "size_selection_impl.inl"
#include "ties_merge_impl.inl"
#include "nearest_key_impl.inl"
#include "lm_head_impl.inl"
#include "tail_attention_impl.inl"

}  // namespace

const KernelTable& KF_TABLE() {
  static const KernelTable table = {SymmetricBody<float>::kernel(),
                                    SymmetricBody<double>::kernel(),
                                    {},
                                    RankKBody<float>::kernel(),
                                    RankKBody<double>::kernel(),
                                    MaskedStepBody<float>::kernel(),
                                    MaskedStepBody<double>::kernel(),
                                    RowProductsBody<float>::kernel(),
                                    RowProductsBody<double>::kernel(),
                                    RmsNormBody::rows,
                                    RmsNormBody::slopes,
                                    GatedBodies::rows,
                                    GatedBodies::slopes,
                                    OverlapBody::rows,
                                    SizeBodies::count_digits,
                                    SizeBodies::find_equal,
                                    TiesMergeBodies::run,
                                    NearestBody<float>::add_squares,
                                    NearestBody<double>::add_squares,
                                    WidenBody::row,
                                    LmHeadBody<float>::kernel(),
                                    LmHeadBody<double>::kernel(),
                                    TailAttentionBody::kernel()};
  return table;
}

}  // namespace kf::cpu
