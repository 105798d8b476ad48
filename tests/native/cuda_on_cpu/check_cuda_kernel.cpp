// The CUDA kernel of rank_k_update on a processor, against plain loops in double: odd shapes, every layout, the same
// bits in any order of threads and blocks, and memory that ends at a page which must not be touched.
#include <sys/mman.h>
#include <unistd.h>

#include "../../../csrc/cuda/rank_k_update.cuh"
#include "cuda_on_cpu.h"

using kf::DType;
using kf::TensorView;
using operands::Random;

namespace {

int passed = 0, failed = 0;

void report(bool fine, const std::string& what, const char* reason) {
  fine ? ++passed : ++failed;
  if (!fine) std::printf("%s: %s\n", what.c_str(), reason);
  if (failed == 10) std::exit(1);
}

// Row strides that are no multiples of 16 bytes, those that are, columns as neighbors, neither.
enum class Layout { rows, even, transposed, strided, count };

// A matrix between two pages without access, at the first one or at the last; bits beside its numbers are ones.
struct Guarded {
  DType dtype;
  int64_t rows, columns, row_stride, column_stride;
  char *pages, *data;
  size_t page = size_t(sysconf(_SC_PAGESIZE)), inside, bytes;

  Guarded(DType type, int64_t r, int64_t c, Layout layout, bool at_end) : dtype(type), rows(r), columns(c) {
    row_stride = c > 0 ? c : 1, column_stride = 1;
    if (layout == Layout::even) row_stride = (c + 7) / 8 * 8 + 8;
    if (layout == Layout::transposed) row_stride = 1, column_stride = r + 1;
    if (layout == Layout::strided) row_stride = 2 * c + 3, column_stride = 2;
    const int64_t span = r > 0 && c > 0 ? (r - 1) * row_stride + (c - 1) * column_stride + 1 : 0;
    bytes = size_t(span * kf::item_size(type));
    inside = (bytes + page - 1) / page * page;
    void* memory = mmap(nullptr, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    pages = static_cast<char*>(memory);
    if (inside) {
      mprotect(pages + page, inside, PROT_READ | PROT_WRITE);
      std::memset(pages + page, 0xff, inside);
    }
    data = pages + page + (at_end ? inside - bytes : 0);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(pages, inside + 2 * page); }

  void* at(int64_t i, int64_t j) const { return data + (i * row_stride + j * column_stride) * kf::item_size(dtype); }
  double get(int64_t i, int64_t j) const { return operands::read(dtype, at(i, j)); }
  void fill(Random& random) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) operands::write(dtype, at(i, j), random.normal());
    }
  }
  void take(const Guarded& other) { std::memcpy(pages + page, other.pages + page, inside); }
  bool same(const Guarded& other) const { return !inside || !std::memcmp(pages + page, other.pages + page, inside); }
  bool intact() const {
    std::vector<unsigned char> seen(pages + page, pages + page + inside);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        std::memset(seen.data() + (static_cast<char*>(at(i, j)) - pages - page), 0xff, kf::item_size(dtype));
      }
    }
    return std::all_of(seen.begin(), seen.end(), [](unsigned char byte) { return byte == 0xff; });
  }
  TensorView view() const {
    TensorView v;
    v.data = data, v.dtype = dtype, v.ndim = 2;
    v.shape[0] = rows, v.shape[1] = columns, v.stride[0] = row_stride, v.stride[1] = column_stride;
    return v;
  }
};

void check(Random& random, DType dtype, DType copy_dtype, int64_t rows, int64_t columns, int64_t k, Layout layout) {
  const bool copied = dtype == DType::f32 && copy_dtype != DType::f32, at_end = random.below(2);
  const auto any = [&] { return Layout(random.below(int64_t(Layout::count))); };
  Guarded weight(dtype, rows, columns, layout, at_end), again(dtype, rows, columns, layout, at_end);
  Guarded left(DType::f32, rows, k, any(), random.below(2)), right(DType::f32, columns, k, any(), random.below(2));
  Guarded copy(copied ? copy_dtype : DType::bf16, rows, columns, random.below(2) ? layout : any(), random.below(2));
  weight.fill(random), left.fill(random), right.fill(random);
  again.take(weight);
  std::vector<double> expected;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += left.get(i, p) * right.get(j, p);
      expected.push_back(weight.get(i, j) + 0.75 * sum);
    }
  }
  const TensorView copy_view = copied ? copy.view() : TensorView{};
  kf::cuda::rank_k_update(weight.view(), left.view(), right.view(), 0.75, copy_view, 0, nullptr);
  kf::cuda::rank_k_update(again.view(), left.view(), right.view(), 0.75, copy_view, 0, nullptr);
  double error = 0, norm = 0;
  bool rounded = true;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const double e = expected[size_t(i * columns + j)], v = weight.get(i, j);
      error += (v - e) * (v - e), norm += e * e;
      if (copied) rounded &= copy.get(i, j) == operands::rounded_to(copy_dtype, v);
    }
  }
  const double limit = dtype == DType::f32 ? 1e-6 : dtype == DType::bf16 ? 4e-3 : 5e-4;
  const std::string what = "dtype " + std::to_string(int(dtype)) + ", copy " + std::to_string(int(copy_dtype)) +
                           ", layout " + std::to_string(int(layout)) + ": " + std::to_string(rows) + " x " +
                           std::to_string(columns) + ", k " + std::to_string(k);
  report(std::sqrt(error) <= limit * std::sqrt(norm), what, "differs");  // NaN is not below a limit
  report(rounded, what, "the copy is not its weight, rounded");
  report(weight.same(again), what, "another order of threads gives other bits");
  report(weight.intact() && copy.intact() && left.intact() && right.intact(), what, "wrote beside its matrix");
}

}  // namespace

int main() {
  Random random(3);
  const int64_t row_counts[] = {1, 64, 65, 130}, column_counts[] = {1, 7, 256, 257};
  const int64_t depths[] = {0, 1, 15, 16, 17, 33};
  int turn = 0;
  for (int64_t rows : row_counts) {
    for (int64_t columns : column_counts) {
      for (int layout = 0; layout < int(Layout::count); ++layout) {
        const int64_t k = depths[turn++ % 6];
        check(random, DType::f32, DType::f32, rows, columns, k, Layout(layout));
        check(random, DType::f32, turn % 2 ? DType::bf16 : DType::f16, columns, rows, k, Layout(layout));
        check(random, turn % 2 ? DType::f16 : DType::bf16, DType::f32, rows, columns, k, Layout(layout));
      }
    }
  }
  check(random, DType::f32, DType::bf16, 0, 5, 3, Layout::rows);
  check(random, DType::bf16, DType::f32, 5, 0, 3, Layout::rows);
  std::printf("%lld launches, %lld rounds of threads\n", static_cast<long long>(cuda_on_cpu::launches),
              static_cast<long long>(cuda_on_cpu::barriers));
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
