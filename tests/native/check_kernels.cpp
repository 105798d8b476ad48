// rank_k_update, symmetric_rank_k_update, rms_norm, gated_silu and the gradients of both of every instruction set in
// this build against plain loops in double: sizes around those of vectors and tiles, every layout, NaN, canaries.
// Prints what is wrong; the last line is "N passed, M failed". Ends with 1 where anything failed.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/cpu/gated.h"
#include "../../csrc/cpu/kernel_table.h"
#include "../../csrc/cpu/rank_k_update.h"
#include "../../csrc/cpu/rms_norm.h"
#include "../../csrc/cpu/symmetric_rank_k_update.h"
#include "operands.h"

using namespace kf::cpu;
using kf::Isa;
using operands::DType;
using operands::Layout;
using operands::Matrix;
using operands::Random;

namespace {

constexpr int64_t SIZES[] = {0, 1, 7, 63, 64, 65, 129};
constexpr DType FLOATS[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
const char* const NAMES[] = {"float32", "float64", "bfloat16", "float16"};
const double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

int passed = 0, failed = 0;

void report(bool fine, const std::string& what, const char* reason) {
  fine ? ++passed : ++failed;
  if (!fine && failed < 20) std::printf("%s %s: %s\n", kf::isa_name(active_isa()), what.c_str(), reason);
}

template <class... Numbers>
std::string call_of(const char* op, DType dtype, Numbers... numbers) {
  std::string text = std::string(op) + " " + NAMES[int(dtype)];
  ((text += " " + std::to_string(numbers)), ...);
  return text;
}

Layout any_layout(Random& random) { return Layout(random.below(int64_t(Layout::count))); }

// Relative Frobenius limits, as in tests/floors.py.
double rank_k_limit(DType dtype) {
  return dtype == DType::f32 ? 1e-6 : dtype == DType::f64 ? 2e-14 : dtype == DType::bf16 ? 4e-3 : 5e-4;
}

// NaN where it is expected and nowhere else, and the rest within `limit` of its norm.
bool close(const std::vector<double>& result, const std::vector<double>& expected, double limit) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < result.size(); ++i) {
    if (std::isnan(result[i]) != std::isnan(expected[i])) return false;
    if (std::isnan(expected[i]) || result[i] == expected[i]) continue;
    error += (result[i] - expected[i]) * (result[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error) <= limit * std::sqrt(norm);
}

// The same for numbers of any size: each within `limit` of itself, `tiny` where it is smaller than that.
bool each_close(const std::vector<double>& result, const std::vector<double>& expected, double limit, double tiny) {
  for (size_t i = 0; i < result.size(); ++i) {
    if (std::isnan(result[i]) != std::isnan(expected[i])) return false;
    if (std::isnan(expected[i]) || result[i] == expected[i]) continue;
    if (!(std::fabs(result[i] - expected[i]) <= limit * std::fabs(expected[i]) + tiny)) return false;
  }
  return true;
}

void check_rank_k(Random& random, DType dtype, int64_t rows, int64_t columns, int64_t k, bool spoil) {
  const DType factor = random.below(2) ? dtype : FLOATS[random.below(4)];
  const Layout layout = any_layout(random);
  Matrix weight(dtype, rows, columns, layout), left(factor, rows, k, any_layout(random));
  Matrix right(factor, columns, k, any_layout(random));
  weight.fill(random), left.fill(random), right.fill(random);
  const bool copied = dtype == DType::f32 && random.below(2);
  Matrix copy(random.below(2) ? DType::bf16 : DType::f16, rows, columns, random.below(2) ? layout : Layout::padded);
  if (spoil && rows > 0 && k > 0) left.set(rows / 2, k - 1, NOT_A_NUMBER);
  const double alpha = 0.75;
  std::vector<double> expected = weight.numbers();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += left.get(i, p) * right.get(j, p);
      expected[size_t(i * columns + j)] += alpha * sum;
    }
  }
  rank_k_update(weight.view, left.view, right.view, alpha, copied ? copy.view : kf::TensorView{}, 1);
  const std::string what = call_of("rank_k_update", dtype, int(layout), rows, columns, k);
  report(close(weight.numbers(), expected, rank_k_limit(dtype)), what, "differs");
  report(weight.intact() && copy.intact() && left.intact() && right.intact(), what, "wrote beside its matrix");
  if (!copied) return;
  std::vector<double> narrowed = weight.numbers();
  for (double& v : narrowed) v = operands::rounded_to(copy.dtype, v);
  report(each_close(copy.numbers(), narrowed, 0, 0), what, "the copy is not its weight, rounded");
}

void check_symmetric(Random& random, DType dtype, int64_t n, int64_t d, bool spoil) {
  const DType sum_dtype = dtype == DType::f64 || random.below(2) ? DType::f64 : DType::f32;
  Matrix acc(sum_dtype, d, d, random.below(2) ? Layout::rows : Layout::padded);
  Matrix x(dtype, n, d, any_layout(random)), weights(DType::f64, 1, n);
  acc.fill(random), x.fill(random);
  std::vector<uint8_t> rows(size_t(n) + 1);
  for (int64_t r = 0; r < n; ++r) {
    weights.set(0, r, random.below(4) ? 0.25 + random.uniform() : 0);
    rows[size_t(r)] = random.below(4) != 0;
  }
  const bool weighted = random.below(2), masked = random.below(2);
  if (spoil && n > 1 && d > 0) {  // one row that counts, and one that is left out
    x.set(0, d / 2, NOT_A_NUMBER), weights.set(0, 0, 1), rows[0] = 1;
    x.set(n - 1, 0, NOT_A_NUMBER), weights.set(0, n - 1, 0), rows[size_t(n - 1)] = 0;
  }
  kf::TensorView mask;
  mask.data = rows.data(), mask.dtype = DType::u8, mask.ndim = 1, mask.shape[0] = n, mask.stride[0] = 1;
  const double alpha = 0.75;
  std::vector<double> expected = acc.numbers();
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < n; ++r) {
        const double w = weighted ? weights.get(0, r) : 1;
        if (w != 0 && (!masked || rows[size_t(r)])) sum += w * x.get(r, i) * x.get(r, j);
      }
      expected[size_t(i * d + j)] += alpha * sum;
    }
  }
  symmetric_rank_k_update(acc.view, x.view, weighted ? weights.vector() : kf::TensorView{},
                          masked ? mask : kf::TensorView{}, alpha, 1);
  const std::string what = call_of("symmetric_rank_k_update", dtype, n, d, weighted, masked);
  report(close(acc.numbers(), expected, dtype == DType::f64 ? 4e-15 : 6e-7), what, "differs");
  report(acc.intact() && x.intact() && weights.intact(), what, "wrote beside its matrix");
  bool upper = true;  // bits of the triangle that is never written
  const std::vector<double> after = acc.numbers();
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i + 1; j < d; ++j) upper &= after[size_t(i * d + j)] == expected[size_t(i * d + j)];
  }
  report(upper, what, "wrote above the diagonal");
}

// Of one result whose factor was rounded first: that rounding may go the other way, and the result is rounded again.
double element_limit(DType dtype) { return dtype == DType::f32 ? 5e-7 : dtype == DType::bf16 ? 0.012 : 1.5e-3; }
double element_tiny(DType dtype) { return dtype == DType::f16 ? 2.4e-7 : 1e-36; }

void check_rms_norm(Random& random, DType dtype, int64_t rows, int64_t d, bool spoil) {
  Matrix x(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded), out(dtype, rows, d);
  Matrix weight(random.below(2) ? dtype : DType::f32, 1, d);
  x.fill(random), weight.fill(random);
  if (spoil && rows > 1 && d > 1) x.set(rows / 2, d - 1, NOT_A_NUMBER), weight.set(0, d / 2, NOT_A_NUMBER);
  const bool round_first = random.below(2);
  std::vector<double> expected;
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0;
    for (int64_t j = 0; j < d; ++j) squares += x.get(i, j) * x.get(i, j);
    for (int64_t j = 0; j < d; ++j) {
      const double v = x.get(i, j) / std::sqrt(squares / double(d) + 1e-6);
      expected.push_back((round_first ? operands::rounded_to(dtype, v) : v) * weight.get(0, j));
    }
  }
  rms_norm(out.view, x.view, weight.vector(), 1e-6, round_first, 1);
  const std::string what = call_of("rms_norm", dtype, rows, d, round_first);
  report(each_close(out.numbers(), expected, element_limit(dtype), element_tiny(dtype)), what, "differs");
  report(out.intact() && x.intact() && weight.intact(), what, "wrote beside its matrix");
}

void check_rms_norm_backward(Random& random, DType dtype, int64_t rows, int64_t d, bool spoil) {
  Matrix x(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded), out(dtype, rows, d);
  Matrix grad(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded);
  Matrix weight(random.below(2) ? dtype : DType::f32, 1, d), rstd(DType::f32, 1, rows);
  x.fill(random), grad.fill(random), weight.fill(random);
  if (spoil && rows > 1 && d > 1) x.set(rows / 2, d - 1, NOT_A_NUMBER), grad.set(0, d / 2, NOT_A_NUMBER);
  std::vector<double> first, second;  // the gradient's two terms, which may cancel
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0, products = 0;
    for (int64_t j = 0; j < d; ++j) squares += x.get(i, j) * x.get(i, j);
    for (int64_t j = 0; j < d; ++j) products += grad.get(i, j) * weight.get(0, j) * x.get(i, j);
    rstd.set(0, i, 1 / std::sqrt(squares / double(d) + 1e-6));
    const double r = rstd.get(0, i);
    for (int64_t j = 0; j < d; ++j) {
      first.push_back(r * grad.get(i, j) * weight.get(0, j));
      second.push_back(x.get(i, j) * r * r * r * products / double(d));
    }
  }
  rms_norm_backward(out.view, grad.view, x.view, weight.vector(), rstd.vector(), 1);
  std::vector<double> result = out.numbers();
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] += second[i];
    if (std::isnan(second[i])) first[i] = NOT_A_NUMBER;
  }
  const std::string what = call_of("rms_norm_backward", dtype, rows, d, spoil);
  report(close(result, first, element_limit(dtype)), what, "differs");
  report(out.intact() && x.intact() && grad.intact() && weight.intact() && rstd.intact(), what, "wrote beside");
}

void check_gated_silu(Random& random, DType dtype, int64_t rows, int64_t d, bool spoil) {
  Matrix gate(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded), out(dtype, rows, d);
  Matrix up(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded);
  gate.fill(random, 4), up.fill(random);
  if (spoil && rows > 0 && d > 4) {
    const double special[] = {NOT_A_NUMBER, 1000, -1000, std::numeric_limits<double>::infinity()};
    for (int i = 0; i < 4; ++i) gate.set(rows - 1, d - 1 - i, special[i]);
  }
  std::vector<double> expected;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      const double g = gate.get(i, j);
      expected.push_back(operands::rounded_to(dtype, g / (1 + std::exp(-g))) * up.get(i, j));
    }
  }
  gated(Gate::silu, out.view, gate.view, up.view, 1);
  const std::string what = call_of("gated_silu", dtype, rows, d, spoil);
  report(each_close(out.numbers(), expected, element_limit(dtype), element_tiny(dtype)), what, "differs");
  report(out.intact() && gate.intact() && up.intact(), what, "wrote beside its matrix");
}

void check_gated_backward(Random& random, Gate activation, DType dtype, int64_t rows, int64_t d, bool spoil) {
  Matrix gate(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded), d_gate(dtype, rows, d);
  Matrix up(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded), d_up(dtype, rows, d);
  Matrix grad(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded);
  gate.fill(random, 2), up.fill(random), grad.fill(random);
  if (spoil && rows > 0 && d > 3) {
    const double special[] = {NOT_A_NUMBER, 1000, -1000};
    for (int i = 0; i < 3; ++i) gate.set(rows - 1, d - 1 - i, special[i]);
  }
  std::vector<double> in_gate, in_up;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      const double x = gate.get(i, j), c = 2 * std::sqrt(2 / 3.14159265358979323846);
      const bool silu = activation == Gate::silu;
      const double z = silu ? x : c * (x + 0.044715 * x * x * x), dz = silu ? 1 : c * (1 + 3 * 0.044715 * x * x);
      const double s = 1 / (1 + std::exp(-z));
      in_gate.push_back(grad.get(i, j) * up.get(i, j) * (s + x * dz * s * (1 - s)));
      in_up.push_back(grad.get(i, j) * operands::rounded_to(dtype, x * s));
    }
  }
  gated_backward(activation, d_gate.view, d_up.view, grad.view, gate.view, up.view, 1);
  const std::string what = call_of("gated_backward", dtype, rows, d, spoil);
  report(close(d_gate.numbers(), in_gate, element_limit(dtype)), what, "differs in the gate");
  report(close(d_up.numbers(), in_up, element_limit(dtype)), what, "differs beside the gate");
  report(d_gate.intact() && d_up.intact() && grad.intact() && gate.intact() && up.intact(), what, "wrote beside");
}

// Every 16-bit number widened, and numbers of all sizes narrowed, ties, subnormal and overflowing ones among them.
void check_conversions(Random& random) {
  for (DType dtype : {DType::bf16, DType::f16}) {
    std::vector<uint16_t> bits(65536);
    std::vector<float> wide(65536 + 1, 7.0f);
    for (int i = 0; i < 65536; ++i) bits[size_t(i)] = uint16_t(i);
    active_table().widen_row(bits.data(), dtype, 65536, wide.data());
    bool fine = wide[65536] == 7.0f;
    for (int i = 0; i < 65536; ++i) {
      const double expected = operands::read(dtype, &bits[size_t(i)]), v = wide[size_t(i)];
      fine &= std::isnan(expected) ? std::isnan(v) : v == expected && std::signbit(v) == std::signbit(expected);
    }
    report(fine, call_of("widen_row", dtype), "differs");

    const int64_t n = 40001;
    Matrix weight(DType::f32, 1, n), copy(dtype, 1, n), left(DType::f32, 1, 0), right(DType::f32, n, 0);
    std::vector<double> expected;
    for (int64_t j = 0; j < n; ++j) {
      double v = std::ldexp(random.normal(), int(random.below(60)) - 40);
      if (j % 3 == 0) {  // half way between two neighbors, or next to it
        const uint16_t here = uint16_t(random.below(dtype == DType::f16 ? 0x7c00 : 0x7f00));
        const uint16_t next = uint16_t(here + 1);
        const double a = operands::read(dtype, &here), b = operands::read(dtype, &next);
        v = std::isinf(b) ? 65520 - 16 * double(random.below(2)) : (a + b) / 2;
        if (random.below(2)) v = std::nextafter(float(v), random.below(2) ? 0.0f : 1e30f);
      }
      weight.set(0, j, random.below(2) ? -v : v);
      expected.push_back(operands::rounded_to(dtype, weight.get(0, j)));
    }
    rank_k_update(weight.view, left.view, right.view, 1.0, copy.view, 1);
    report(each_close(copy.numbers(), expected, 0, 0), call_of("a copy", dtype), "is not rounded to the nearest");
  }
}

void check_all() {
  Random random(7);
  check_conversions(random);
  for (bool spoil : {false, true}) {
    for (int64_t rows : SIZES) {
      for (int64_t columns : SIZES) {
        for (DType dtype : FLOATS) {
          // A third size for every product of the first two, so that each triple of sizes comes with some dtype.
          for (size_t i = size_t(dtype) % 2; i < std::size(SIZES); i += 2) {
            check_rank_k(random, dtype, rows, columns, SIZES[i], spoil);
          }
          check_symmetric(random, dtype, rows, columns, spoil);
          if (dtype == DType::f64) continue;
          check_rms_norm(random, dtype, rows, columns, spoil);
          check_gated_silu(random, dtype, rows, columns, spoil);
          check_rms_norm_backward(random, dtype, rows, columns, spoil);
          check_gated_backward(random, Gate::silu, dtype, rows, columns, spoil);
          check_gated_backward(random, Gate::gelu_tanh, dtype, rows, columns, spoil);
        }
      }
    }
  }
  check_symmetric(random, DType::f32, 4200, 11, false);  // more rows than are packed at a time
  check_rank_k(random, DType::f32, 13, 21, 700, false);  // a longer sum than goes without a stop
}

}  // namespace

int main() {
  int sets = 0;
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::neon}) {
    if (const std::string reason = refusal(isa); !reason.empty()) {
      std::printf("%s skipped: %s\n", kf::isa_name(isa), reason.c_str());
      continue;
    }
    select_isa(isa);
    check_all();
    std::printf("%s checked\n", kf::isa_name(isa));
    ++sets;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed || sets == 0;
}
