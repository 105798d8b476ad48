// The module kedit_fast._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>

#include "../common/aligned_buffer.h"
#include "../common/parallel.h"
#include "../cpu/best_overlap.h"
#include "../cpu/gated.h"
#include "../cpu/kernel_table.h"
#include "../cpu/lm_head.h"
#include "../cpu/magnitude_bound.h"
#include "../cpu/masked_step.h"
#include "../cpu/nearest_key.h"
#include "../cpu/rank_k_update.h"
#include "../cpu/rms_norm.h"
#include "../cpu/routed_linear.h"
#include "../cpu/symmetric_rank_k_update.h"
#include "../cpu/tail_attention.h"
#include "../cpu/ties_merge.h"
#include "dlpack_tensor.h"

namespace py = pybind11;
using kf::Isa;
using kf::bind::borrow;
using kf::cpu::Gate;

namespace {

// The inputs of tail_attention and its backward pass, in this order; those of prefixes may be None.
struct TailAttentionArguments {
  std::vector<kf::bind::BorrowedTensor> tensors;
  kf::cpu::TailAttentionInputs inputs;

  TailAttentionArguments(const py::tuple& arguments, double scale, double softcap, int64_t window) {
    constexpr const char* NAMES[] = {"query",       "key",           "value", "starts",
                                     "prefix_keys", "prefix_values", "spans", "prefix_rows"};
    kf::require(arguments.size() == std::size(NAMES), "inputs must be eight tensors");
    for (size_t i = 0; i < std::size(NAMES); ++i) tensors.push_back(borrow(kDLCPU, arguments[i], NAMES[i]));
    inputs = {tensors[0].view, tensors[1].view, tensors[2].view, tensors[3].view, tensors[4].view, tensors[5].view,
              tensors[6].view, tensors[7].view, scale,           softcap,         window};
  }
};

constexpr Isa ALL_ISAS[] = {Isa::generic, Isa::avx2, Isa::avx512, Isa::amx, Isa::neon};

Isa isa_from_name(const std::string& name) {
  for (Isa isa : ALL_ISAS) {
    if (name == kf::isa_name(isa)) return isa;
  }
  throw kf::InvalidArgument("isa must be generic, avx2, avx512, amx or neon, got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "kedit_fast kernels in C++: plain functions over DLPack capsules or NumPy arrays.";
  py::register_exception<kf::InvalidArgument>(m, "InvalidArgument", PyExc_ValueError);

  m.def("isa", [] { return std::string(kf::isa_name(kf::cpu::active_isa())); });
  m.def("select_isa", [](const std::string& name) { kf::cpu::select_isa(isa_from_name(name)); }, py::arg("name"));
  m.def("isas", [] {
    py::dict reasons;  // name -> why it cannot be used here, or None
    for (Isa isa : ALL_ISAS) {
      const std::string refusal = kf::cpu::refusal(isa);
      reasons[kf::isa_name(isa)] = refusal.empty() ? py::object(py::none()) : py::object(py::str(refusal));
    }
    return reasons;
  });
  m.def("cpu_features", &kf::cpu_features);
  m.def("thread_source", [] { return std::string(kf::thread_source()); });
  m.def("release_scratch", &kf::release_scratch, "Free the scratch memory that is pooled between calls.");
  m.def("compiler", [] { return std::string(__VERSION__); });

  m.def(
      "symmetric_rank_k_update_",
      [](const py::object& acc, const py::object& x, const py::object& row_weights, const py::object& mask,
         double alpha, int threads) {
        auto a = borrow(kDLCPU, acc, "acc"), b = borrow(kDLCPU, x, "x");
        auto w = borrow(kDLCPU, row_weights, "row_weights"), k = borrow(kDLCPU, mask, "mask");
        py::gil_scoped_release release;
        kf::cpu::symmetric_rank_k_update(a.view, b.view, w.view, k.view, alpha, threads);
      },
      py::arg("acc"), py::arg("x"), py::arg("row_weights"), py::arg("mask"), py::arg("alpha"), py::arg("threads"));

  m.def(
      "rank_k_update_",
      [](const py::object& weight, const py::object& left, const py::object& right, double alpha,
         const py::object& copy, int threads) {
        auto w = borrow(kDLCPU, weight, "weight"), l = borrow(kDLCPU, left, "left");
        auto r = borrow(kDLCPU, right, "right"), c = borrow(kDLCPU, copy, "copy");
        py::gil_scoped_release release;
        kf::cpu::rank_k_update(w.view, l.view, r.view, alpha, c.view, threads);
      },
      py::arg("weight"), py::arg("left"), py::arg("right"), py::arg("alpha"), py::arg("copy"), py::arg("threads"));

  m.def(
      "grouped_symmetric_rank_k_update_",
      [](const py::object& acc, const py::object& x, const py::object& offsets, const py::object& row_weights,
         double alpha, int threads) {
        auto a = borrow(kDLCPU, acc, "acc"), b = borrow(kDLCPU, x, "x"), o = borrow(kDLCPU, offsets, "offsets");
        auto w = borrow(kDLCPU, row_weights, "row_weights");
        py::gil_scoped_release release;
        kf::cpu::grouped_symmetric_rank_k_update(a.view, b.view, o.view, w.view, alpha, threads);
      },
      py::arg("acc"), py::arg("x"), py::arg("offsets"), py::arg("row_weights"), py::arg("alpha"), py::arg("threads"));

  m.def(
      "grouped_rank_k_update_",
      [](const py::object& weight, const py::object& left, const py::object& right, const py::object& columns,
         const py::object& offsets, double alpha, const py::object& copy, int threads) {
        auto w = borrow(kDLCPU, weight, "weight"), l = borrow(kDLCPU, left, "left");
        auto r = borrow(kDLCPU, right, "right"), k = borrow(kDLCPU, columns, "columns");
        auto o = borrow(kDLCPU, offsets, "offsets"), c = borrow(kDLCPU, copy, "copy");
        py::gil_scoped_release release;
        kf::cpu::grouped_rank_k_update(w.view, l.view, r.view, k.view, o.view, alpha, c.view, threads);
      },
      py::arg("weight"), py::arg("left"), py::arg("right"), py::arg("columns"), py::arg("offsets"), py::arg("alpha"),
      py::arg("copy"), py::arg("threads"));

  m.def(
      "masked_descent_",
      [](const py::object& weight, double lr, const py::object& grad, const py::object& left, const py::object& right,
         const py::object& entries, double decay, bool decay_all, const py::object& origin, double bound,
         const py::object& copy, int threads) {
        auto w = borrow(kDLCPU, weight, "weight"), g = borrow(kDLCPU, grad, "grad"), l = borrow(kDLCPU, left, "left");
        auto r = borrow(kDLCPU, right, "right"), e = borrow(kDLCPU, entries, "entries");
        auto o = borrow(kDLCPU, origin, "origin"), c = borrow(kDLCPU, copy, "copy");
        py::gil_scoped_release release;
        const kf::cpu::StepInput input = {g.view, l.view, r.view, e.view, o.view, bound};
        return kf::cpu::masked_descent(w.view, input, {lr, decay, decay_all}, c.view, threads);
      },
      py::arg("weight"), py::arg("lr"), py::arg("grad"), py::arg("left"), py::arg("right"), py::arg("entries"),
      py::arg("decay"), py::arg("decay_all"), py::arg("origin"), py::arg("bound"), py::arg("copy"), py::arg("threads"));

  m.def(
      "masked_adam_",
      [](const py::object& weight, const py::object& mean, const py::object& square, double step, double root,
         double beta1, double beta2, double eps, bool active, const py::object& grad, const py::object& left,
         const py::object& right, const py::object& entries, const py::object& origin, double bound,
         const py::object& copy, int threads) {
        auto w = borrow(kDLCPU, weight, "weight"), m = borrow(kDLCPU, mean, "mean");
        auto s = borrow(kDLCPU, square, "square"), g = borrow(kDLCPU, grad, "grad"), l = borrow(kDLCPU, left, "left");
        auto r = borrow(kDLCPU, right, "right"), e = borrow(kDLCPU, entries, "entries");
        auto o = borrow(kDLCPU, origin, "origin"), c = borrow(kDLCPU, copy, "copy");
        py::gil_scoped_release release;
        const kf::cpu::StepInput input = {g.view, l.view, r.view, e.view, o.view, bound};
        const kf::cpu::AdamNumbers numbers = {step, root, beta1, beta2, eps, active};
        return kf::cpu::masked_adam(w.view, m.view, s.view, input, numbers, c.view, threads);
      },
      py::arg("weight"), py::arg("mean"), py::arg("square"), py::arg("step"), py::arg("root"), py::arg("beta1"),
      py::arg("beta2"), py::arg("eps"), py::arg("active"), py::arg("grad"), py::arg("left"), py::arg("right"),
      py::arg("entries"), py::arg("origin"), py::arg("bound"), py::arg("copy"), py::arg("threads"));

  m.def(
      "activation_distance",
      [](const py::object& distances, const py::object& x, const py::object& reference, const py::object& weights,
         const std::vector<int64_t>& starts, const std::string& activation, int64_t long_from, const py::object& bias,
         int threads) {
        auto o = borrow(kDLCPU, distances, "distances"), a = borrow(kDLCPU, x, "x");
        auto r = borrow(kDLCPU, reference, "reference"), w = borrow(kDLCPU, weights, "weights");
        auto b = borrow(kDLCPU, bias, "bias");
        py::gil_scoped_release release;
        const int64_t sequences = static_cast<int64_t>(starts.size()) - 1;
        kf::cpu::activation_distance(o.view, a.view, r.view, w.view, starts.data(), sequences, activation, long_from,
                                     b.view, threads);
      },
      py::arg("distances"), py::arg("x"), py::arg("reference"), py::arg("weights"), py::arg("starts"),
      py::arg("activation"), py::arg("long"), py::arg("bias"), py::arg("threads"));

  m.def(
      "routed_linear",
      [](const py::object& out, const py::object& x, const py::object& weight, const py::object& memories,
         const std::vector<int64_t>& route, const py::object& bias, int threads) {
        auto o = borrow(kDLCPU, out, "out"), a = borrow(kDLCPU, x, "x"), w = borrow(kDLCPU, weight, "weight");
        auto m = borrow(kDLCPU, memories, "memories"), b = borrow(kDLCPU, bias, "bias");
        py::gil_scoped_release release;
        kf::require(static_cast<int64_t>(route.size()) == a.view.shape[0], "route must be [n]");
        kf::cpu::routed_linear(o.view, a.view, w.view, m.view, route.data(), b.view, threads);
      },
      py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("memories"), py::arg("route"), py::arg("bias"),
      py::arg("threads"));

  m.def(
      "rms_norm",
      [](const py::object& out, const py::object& x, const py::object& weight, double eps, bool round_first,
         int threads, const py::object& rstd) {
        auto o = borrow(kDLCPU, out, "out"), a = borrow(kDLCPU, x, "x"), w = borrow(kDLCPU, weight, "weight");
        auto r = borrow(kDLCPU, rstd, "rstd");
        py::gil_scoped_release release;
        kf::cpu::rms_norm(o.view, a.view, w.view, eps, round_first, threads, r.view);
      },
      py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("round_first"), py::arg("threads"),
      py::arg("rstd") = py::none());

  m.def(
      "rms_norm_backward",
      [](const py::object& out, const py::object& grad, const py::object& x, const py::object& weight,
         const py::object& rstd, int threads) {
        auto o = borrow(kDLCPU, out, "out"), g = borrow(kDLCPU, grad, "grad"), a = borrow(kDLCPU, x, "x");
        auto w = borrow(kDLCPU, weight, "weight"), r = borrow(kDLCPU, rstd, "rstd");
        py::gil_scoped_release release;
        kf::cpu::rms_norm_backward(o.view, g.view, a.view, w.view, r.view, threads);
      },
      py::arg("out"), py::arg("grad"), py::arg("x"), py::arg("weight"), py::arg("rstd"), py::arg("threads"));

  for (const auto& [op, activation] : {std::pair{"gated_silu", Gate::silu}, std::pair{"gated_gelu", Gate::gelu_tanh}}) {
    m.def(
        op,
        [activation = activation](const py::object& out, const py::object& gate, const py::object& up, int threads) {
          auto o = borrow(kDLCPU, out, "out"), g = borrow(kDLCPU, gate, "gate"), u = borrow(kDLCPU, up, "up");
          py::gil_scoped_release release;
          kf::cpu::gated(activation, o.view, g.view, u.view, threads);
        },
        py::arg("out"), py::arg("gate"), py::arg("up"), py::arg("threads"));
    m.def((std::string(op) + "_backward").c_str(),
          [activation = activation](const py::object& d_gate, const py::object& d_up, const py::object& grad,
                                    const py::object& gate, const py::object& up, int threads) {
            auto dg = borrow(kDLCPU, d_gate, "d_gate"), du = borrow(kDLCPU, d_up, "d_up");
            auto o = borrow(kDLCPU, grad, "grad"), g = borrow(kDLCPU, gate, "gate"), u = borrow(kDLCPU, up, "up");
            py::gil_scoped_release release;
            kf::cpu::gated_backward(activation, dg.view, du.view, o.view, g.view, u.view, threads);
          },
          py::arg("d_gate"), py::arg("d_up"), py::arg("grad"), py::arg("gate"), py::arg("up"), py::arg("threads"));
  }

  m.def(
      "nearest_key",
      [](const py::object& index, const py::object& distance, const py::object& queries, const py::object& keys,
         const py::object& product, int threads) {
        auto i = borrow(kDLCPU, index, "index"), d = borrow(kDLCPU, distance, "distance");
        auto q = borrow(kDLCPU, queries, "queries"), k = borrow(kDLCPU, keys, "keys");
        auto p = borrow(kDLCPU, product, "product");
        py::gil_scoped_release release;
        kf::cpu::nearest_key(i.view, d.view, q.view, k.view, p.view, threads);
      },
      py::arg("index"), py::arg("distance"), py::arg("queries"), py::arg("keys"), py::arg("product"),
      py::arg("threads"));

  m.def(
      "nearest_open_share",
      [](const py::object& queries, const py::object& keys, int threads) {
        auto q = borrow(kDLCPU, queries, "queries"), k = borrow(kDLCPU, keys, "keys");
        py::gil_scoped_release release;
        return kf::cpu::nearest_open_share(q.view, k.view, threads);
      },
      py::arg("queries"), py::arg("keys"), py::arg("threads"));

  m.def(
      "target_log_probs",
      [](const py::object& log_prob, const py::object& top1, const py::object& top1_log_prob, const py::object& slope,
         const py::object& hidden, const py::object& head, const py::object& targets, const py::object& bias,
         double softcap, int threads) {
        auto v = borrow(kDLCPU, log_prob, "log_prob"), i = borrow(kDLCPU, top1, "top1");
        auto l = borrow(kDLCPU, top1_log_prob, "top1_log_prob"), s = borrow(kDLCPU, slope, "slope");
        auto x = borrow(kDLCPU, hidden, "hidden"), e = borrow(kDLCPU, head, "head");
        auto t = borrow(kDLCPU, targets, "targets"), b = borrow(kDLCPU, bias, "bias");
        py::gil_scoped_release release;
        kf::cpu::target_log_probs({v.view, i.view, l.view, s.view}, x.view, e.view, t.view, b.view, softcap, threads);
      },
      py::arg("log_prob"), py::arg("top1"), py::arg("top1_log_prob"), py::arg("slope"), py::arg("hidden"),
      py::arg("head"), py::arg("targets"), py::arg("bias"), py::arg("softcap"), py::arg("threads"));

  m.def(
      "distribution_kl",
      [](const py::object& kl, const py::object& slope, const py::object& hidden, const py::object& hidden_ref,
         const py::object& head, const py::object& bias, double softcap, bool reverse, int threads) {
        auto v = borrow(kDLCPU, kl, "kl"), s = borrow(kDLCPU, slope, "slope");
        auto x = borrow(kDLCPU, hidden, "hidden"), r = borrow(kDLCPU, hidden_ref, "hidden_ref");
        auto e = borrow(kDLCPU, head, "head"), b = borrow(kDLCPU, bias, "bias");
        py::gil_scoped_release release;
        kf::cpu::distribution_kl(v.view, s.view, x.view, r.view, e.view, b.view, softcap, reverse, threads);
      },
      py::arg("kl"), py::arg("slope"), py::arg("hidden"), py::arg("hidden_ref"), py::arg("head"), py::arg("bias"),
      py::arg("softcap"), py::arg("reverse"), py::arg("threads"));

  m.def(
      "best_overlap",
      [](const py::object& index, const py::object& count, const py::object& masks, const py::object& book,
         int threads) {
        auto i = borrow(kDLCPU, index, "index"), c = borrow(kDLCPU, count, "count");
        auto a = borrow(kDLCPU, masks, "masks"), b = borrow(kDLCPU, book, "book");
        py::gil_scoped_release release;
        kf::cpu::best_overlap(i.view, c.view, a.view, b.view, threads);
      },
      py::arg("index"), py::arg("count"), py::arg("masks"), py::arg("book"), py::arg("threads"));

  m.def(
      "magnitude_bound",
      [](const py::object& out, const py::object& x, const py::object& divisor, int64_t count, int threads) {
        auto o = borrow(kDLCPU, out, "out"), a = borrow(kDLCPU, x, "x"), b = borrow(kDLCPU, divisor, "divisor");
        py::gil_scoped_release release;
        kf::cpu::magnitude_bound(o.view, a.view, b.view, count, threads);
      },
      py::arg("out"), py::arg("x"), py::arg("divisor"), py::arg("count"), py::arg("threads"));

  m.def(
      "ties_merge_",
      [](const py::object& out, const py::object& base, const py::object& memories,
         const std::vector<double>& coefficients, int64_t count, int threads) {
        auto o = borrow(kDLCPU, out, "out"), b = borrow(kDLCPU, base, "base");
        auto w = borrow(kDLCPU, memories, "memories");
        py::gil_scoped_release release;
        return kf::cpu::ties_merge(o.view, b.view, w.view, coefficients, count, threads);
      },
      py::arg("out"), py::arg("base"), py::arg("memories"), py::arg("coefficients"), py::arg("count"),
      py::arg("threads"));

  m.def(
      "tail_attention",
      [](const py::object& out, const py::object& normalizer, const py::tuple& inputs, double scale, double softcap,
         int64_t window, int threads) {
        auto o = borrow(kDLCPU, out, "out"), n = borrow(kDLCPU, normalizer, "normalizer");
        const TailAttentionArguments arguments(inputs, scale, softcap, window);
        py::gil_scoped_release release;
        kf::cpu::tail_attention(o.view, n.view, arguments.inputs, threads);
      },
      py::arg("out"), py::arg("normalizer"), py::arg("inputs"), py::arg("scale"), py::arg("softcap"), py::arg("window"),
      py::arg("threads"));

  m.def(
      "tail_attention_backward",
      [](const py::object& of_query, const py::object& of_key, const py::object& of_value, const py::object& grad,
         const py::object& normalizer, const py::tuple& inputs, double scale, double softcap, int64_t window,
         int threads) {
        auto q = borrow(kDLCPU, of_query, "of_query"), k = borrow(kDLCPU, of_key, "of_key");
        auto v = borrow(kDLCPU, of_value, "of_value"), g = borrow(kDLCPU, grad, "grad");
        auto n = borrow(kDLCPU, normalizer, "normalizer");
        const TailAttentionArguments arguments(inputs, scale, softcap, window);
        py::gil_scoped_release release;
        kf::cpu::tail_attention_backward(q.view, k.view, v.view, g.view, n.view, arguments.inputs, threads);
      },
      py::arg("of_query"), py::arg("of_key"), py::arg("of_value"), py::arg("grad"), py::arg("normalizer"),
      py::arg("inputs"), py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("threads"));
}
