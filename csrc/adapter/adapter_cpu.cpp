// The adapter's forward on the CPU. A tile of tokens goes through both products while it lies in the cache: x is read
// from memory once, out written once, and of what lies between only the (tokens, bottleneck) `hidden` leaves.
#include "adapter/adapter_backward.h"
#include "adapter/adapter_tile.h"

namespace lwft::LWFT_ISA {
namespace {

template <class E>
class Forward {
  using T = SumOf<E>;

 public:
  explicit Forward(const AdapterForward& p)
      : p_(p),
        d_(p.model_dim),
        m_(p.bottleneck),
        norm_weight_(p.norm_weight ? parameter_row(p.param_dtype, p.norm_weight, d_, T{1}, scratch_) : nullptr),
        norm_bias_(p.norm_weight ? parameter_row(p.param_dtype, p.norm_bias, d_, T{0}, scratch_) : nullptr),
        down_bias_(parameter_row(p.param_dtype, p.down_bias, m_, T{0}, scratch_)),
        up_bias_(parameter_row(p.param_dtype, p.up_bias, d_, T{0}, scratch_)) {}

  void run() {
    if constexpr (!kIsPair<E>) {
      if (p_.tokens <= kFewTokens) return run_few();
    }
    run_tiles();
  }

 private:
  // Z = N Wd^T + bd, N = LayerNorm(X);  out = residual + dropout(scale * (act(Z) Wu^T + bu)), tile by tile.
  void run_tiles() {
    const PackedWeight<E> down(p_.param_dtype, p_.down_weight, 1, d_, d_, m_, scratch_);
    const PackedWeight<E> up(p_.param_dtype, p_.up_weight, 1, m_, m_, d_, scratch_);
    pack(down, up);
    const TokenTiles tiles = token_tiles<T>(p_.tokens, d_);
    parallel_for(tiles.count, [&](int64_t tile) {
      const int64_t begin = tiles.begin(tile), rows = tiles.size(tile);
      const int64_t z_stride = padded<T>(m_), h_stride = kIsPair<E> ? buffer_stride<E>(units<E>(m_)) : z_stride;
      Scratch scratch;
      const Tile<E> input = input_rows(begin, rows, scratch);
      T* z = scratch.take<T>(rows * z_stride);
      E* h = nullptr;
      if constexpr (kIsPair<E>) {
        h = scratch.take<E>(rows * h_stride);
      } else {
        h = z;
      }
      gemm(rows, m_, units<E>(d_), input.data, input.row_stride, 1, down.panels(), z, z_stride, Mode::overwrite);
      for (int64_t i = 0; i < rows; ++i) {
        bottleneck_row(begin + i, z + i * z_stride);
        store_operand(z + i * z_stride, m_, h + i * h_stride);
      }
      T* y = scratch.take<T>(rows * kBlockColumns);
      for (int64_t j = 0; j < d_; j += kBlockColumns) {
        const int64_t columns = minimum(kBlockColumns, d_ - j);
        gemm(rows, columns, units<E>(m_), h, h_stride, 1, up.panels(j), y, kBlockColumns, Mode::overwrite);
        for (int64_t i = 0; i < rows; ++i) branch_row(begin + i, j, columns, y + i * kBlockColumns);
      }
    });
  }

  // The same with the weights where they lie, cut into slices.
  void run_few() {
    const int64_t tokens = p_.tokens, stride = padded<T>(m_);
    const Tile<T> input = input_rows(0, tokens, scratch_);
    T* z = scratch_.take<T>(tokens * stride);
    for_column_slices(m_, d_, [&](int64_t begin, int64_t end) {
      dot_rows(tokens, end - begin, d_, input.data, input.row_stride, p_.param_dtype,
               element(p_.param_dtype, p_.down_weight, begin * d_), d_, z + begin, stride, Mode::overwrite);
    });
    for (int64_t i = 0; i < tokens; ++i) bottleneck_row(i, z + i * stride);
    for_column_slices(d_, m_, [&](int64_t begin, int64_t end) {
      T y[kFewTokens * kBlockColumns];
      for (int64_t j = begin; j < end; j += kBlockColumns) {
        const int64_t columns = minimum(kBlockColumns, end - j);
        dot_rows(tokens, columns, m_, z, stride, p_.param_dtype, element(p_.param_dtype, p_.up_weight, j * m_), m_, y,
                 kBlockColumns, Mode::overwrite);
        for (int64_t i = 0; i < tokens; ++i) branch_row(i, j, columns, y + i * kBlockColumns);
      }
    });
  }

  // LayerNorm(x), or x itself, as E: in place where that is possible.
  Tile<E> input_rows(int64_t begin, int64_t rows, Scratch& scratch) const {
    if (norm_weight_ == nullptr) {
      const Tile<E> x = operand_in_place<E>(p_.dtype, p_.x, begin * p_.x_row_stride, p_.x_row_stride, d_);
      if (x.data != nullptr) return x;
    }
    const int64_t stride = buffer_stride<E>(units<E>(d_));
    E* buffer = scratch.take<E>(rows * stride);
    T* row = scratch.take<T>(padded<T>(d_));
    for (int64_t i = 0; i < rows; ++i) {
      if constexpr (!kIsPair<E>) row = buffer + i * stride;
      const T* x = view_row(p_.dtype, p_.x, (begin + i) * p_.x_row_stride, d_, row);
      if (norm_weight_ != nullptr) norm_row(begin + i, x, row);
      store_operand(norm_weight_ != nullptr ? row : x, d_, buffer + i * stride);
    }
    return {buffer, stride};
  }

  void norm_row(int64_t token, const T* x, T* row) const {
    T mean, rstd;
    row_statistics(x, d_, p_.eps, mean, rstd);
    static_cast<T*>(p_.mean)[token] = mean;
    static_cast<T*>(p_.rstd)[token] = rstd;
    for (int64_t j = 0; j < d_; j += kLanes<T>) {
      const Vec<T> normalised = (load_columns(x, j, d_) - mean) * rstd;
      store(row + j, fma(normalised, load(norm_weight_ + j), load(norm_bias_ + j)));
    }
  }

  // z += bd, kept for backward; then z = act(z).
  void bottleneck_row(int64_t token, T* z) const {
    for (int64_t j = 0; j < m_; j += kLanes<T>) store_columns(z, j, m_, load_columns(z, j, m_) + load(down_bias_ + j));
    store_row(p_.param_dtype, z, m_, p_.hidden, token * m_);
    visit_activation(p_.activation, [&](auto activation) {
      for (int64_t j = 0; j < m_; j += kLanes<T>) {
        Vec<T> value, slope;
        activate<activation()>(load_columns(z, j, m_), value, slope);
        store_columns(z, j, m_, value);
      }
    });
  }

  // n columns from j0 on of one token: y = dropout(scale * (y + bu)), out = residual + y. n <= kBlockColumns.
  void branch_row(int64_t token, int64_t j0, int64_t n, T* y) const {
    const Vec<T> scale = broadcast(static_cast<T>(p_.scale));
    for (int64_t j = 0; j < n; j += kLanes<T>) store(y + j, (load(y + j) + load(up_bias_ + j0 + j)) * scale);
    if (p_.dropout.active()) dropout_row(p_.dropout, token, j0, n, y);
    const int64_t at = token * d_ + j0;
    T* out = p_.dtype == dtype_of<T>() ? static_cast<T*>(p_.out) + at : y;
    if (p_.residual != nullptr) {
      T converted[kBlockColumns];
      const T* residual = view_row(p_.dtype, p_.residual, token * p_.residual_row_stride + j0, n, converted);
      for (int64_t j = 0; j < n; j += kLanes<T>) {
        store_columns(out, j, n, load_columns(residual, j, n) + load(y + j));
      }
    } else if (out != y) {
      for (int64_t j = 0; j < n; j += kLanes<T>) store_columns(out, j, n, load(y + j));
    }
    if (out == y) store_row(p_.dtype, y, n, p_.out, at);
  }

  const AdapterForward& p_;
  const int64_t d_, m_;
  Scratch scratch_;
  const T* norm_weight_;
  const T* norm_bias_;
  const T* down_bias_;
  const T* up_bias_;
};

void forward(const AdapterForward& p) { run_by_dtype<Forward>(p); }

}  // namespace

extern const AdapterKernels adapter_kernels;
constexpr AdapterKernels adapter_kernels = {forward, adapter_backward};

}  // namespace lwft::LWFT_ISA
