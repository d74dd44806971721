// The adapter's backward on the CPU. With N = LayerNorm(x) = n w + b, n = (x - mean) rstd, H = act(Z), and the gradient
// G = dropout mask * grad_out (the scale is applied to the small results instead):
//
//     dWu = scale G^T H,                 dbu = scale (sum over tokens of G),
//     dZ  = scale (G Wu) * act'(Z),      dbd = sum over tokens of dZ,
//     dWd = dZ^T N,                      dN  = dZ Wd,      dx = LayerNorm's gradient of dN (+ grad_out)
//
// and without ever having dN in memory, from D = dZ^T n, which has only (bottleneck, model_dim) elements,
//
//     dWd = D w + dbd b,   dw = sum over the bottleneck of Wd * D,   db = dbd Wd.
//
// Tokens are taken in chunks, each in two passes. The first, cut into tiles of tokens, leaves dx, and H and dZ of the
// chunk. The second, cut into slices of model_dim, reads grad_out and x again (from the last-level cache, if it holds a
// chunk) and adds to the weights' gradients, each of which has one owner: no atomics, the same bits every time.
#include "adapter/adapter_backward.h"

#include "adapter/adapter_tile.h"

namespace lwft::LWFT_ISA {
namespace {

// What is kept between the passes is bounded by this, whatever the number of tokens: (kChunkTokens, bottleneck) twice.
constexpr int64_t kChunkTokens = 2048;

template <class E>
class Backward {
  using T = SumOf<E>;

 public:
  explicit Backward(const AdapterBackward& p)
      : p_(p),
        d_(p.model_dim),
        m_(p.bottleneck),
        few_(!kIsPair<E> && p.tokens <= kFewTokens),
        normed_(p.norm_weight != nullptr),
        up_wanted_(p.dup_weight != nullptr || p.dup_bias != nullptr),
        sums_wanted_(p.ddown_weight != nullptr || p.dnorm_weight != nullptr),
        down_wanted_(sums_wanted_ || p.dnorm_bias != nullptr),
        dz_wanted_(p.dx != nullptr || down_wanted_ || p.ddown_bias != nullptr),
        dz_stride_(buffer_stride<E>(units<E>(m_))),
        h_stride_(kIsPair<E> ? dz_stride_ : padded<T>(m_)),
        sum_stride_(padded<T>(m_)),
        norm_weight_(normed_ ? parameter_row(p.param_dtype, p.norm_weight, d_, T{1}, scratch_) : nullptr),
        norm_bias_(normed_ ? parameter_row(p.param_dtype, p.norm_bias, d_, T{0}, scratch_) : nullptr),
        up_(p.param_dtype, p.up_weight, m_, 1, few_ || !dz_wanted_ ? 0 : d_, m_, scratch_),
        down_(p.param_dtype, p.down_weight, d_, 1, few_ || p.dx == nullptr ? 0 : m_, d_, scratch_) {}

  void run() {
    const int64_t chunks = ceil_div(p_.tokens, kChunkTokens);
    const int64_t chunk_tokens = chunks > 1 ? round_up(ceil_div(p_.tokens, chunks), kKBlock) : p_.tokens;
    tiles_ = token_tiles<T>(chunk_tokens, d_);
    if (few_) tiles_ = {p_.tokens, p_.tokens, p_.tokens > 0 ? 1 : 0};
    dz_ = scratch_.take<E>(dz_wanted_ ? chunk_tokens * dz_stride_ : 0);
    h_ = scratch_.take<E>(up_wanted_ ? chunk_tokens * h_stride_ : 0);
    tile_sums_ = scratch_.take<T>(dz_wanted_ ? tiles_.count * sum_stride_ : 0);
    ddown_bias_ = scratch_.take<T>(sum_stride_);
    for (int64_t k = 0; k < sum_stride_; ++k) ddown_bias_[k] = T{0};
    dup_bias_ = scratch_.take<T>(up_wanted_ ? padded<T>(d_) : 0);
    if (chunks > 1) {
      dup_ = scratch_.take<T>(up_wanted_ ? d_ * sum_stride_ : 0);
      ddown_ = scratch_.take<T>(sums_wanted_ ? slices() * kBlockColumns * m_ : 0);
    }
    pack(up_, down_);

    // at least once: without tokens the gradients are zeros
    chunk_ = 0;
    do {
      chunk_size_ = minimum(chunk_tokens, p_.tokens - chunk_);
      first_ = chunk_ == 0;
      last_ = chunk_ + chunk_size_ == p_.tokens;
      tiles_.tokens = chunk_size_;
      tiles_.count = tiles_.rows > 0 ? ceil_div(chunk_size_, tiles_.rows) : 0;
      token_pass();
      weight_pass();
      chunk_ += chunk_size_;
    } while (!last_);
    if (p_.ddown_bias != nullptr) store_row(p_.param_dtype, ddown_bias_, m_, p_.ddown_bias, 0);
  }

 private:
  // ---- first pass: tiles of tokens ----

  void token_pass() {
    if (few_) {
      if (p_.tokens > 0) token_tile(0);  // its products are cut into slices for the threads
    } else {
      parallel_for(tiles_.count, [&](int64_t tile) { token_tile(tile); });
    }
    for (int64_t tile = 0; dz_wanted_ && tile < tiles_.count; ++tile) {
      for (int64_t k = 0; k < m_; ++k) ddown_bias_[k] += tile_sums_[tile * sum_stride_ + k];
    }
  }

  void token_tile(int64_t tile) {
    const int64_t begin = tiles_.begin(tile), rows = tiles_.size(tile);
    Scratch scratch;
    // G Wu, which becomes dZ: in the place of dZ, if that is of the same type
    T* product = nullptr;
    int64_t stride = dz_stride_;
    if constexpr (kIsPair<E>) {
      stride = sum_stride_;
      product = scratch.take<T>(dz_wanted_ ? rows * stride : 0);
    } else {
      product = dz_ + begin * dz_stride_;
    }
    if (dz_wanted_) times_up_weight(begin, rows, product, stride);
    activation_rows(begin, rows, product, stride);
    if (dz_wanted_) column_sums(product, rows, stride, m_, tile_sums_ + tile * sum_stride_);
    if (p_.dx == nullptr) return;
    if (normed_) {
      input_gradient_with_norm(begin, rows);
    } else {
      input_gradient(begin, rows);
    }
  }

  void times_up_weight(int64_t begin, int64_t rows, T* product, int64_t stride) const {
    Scratch scratch;
    const Tile<E> g = gradient_rows(begin, rows, scratch);
    if constexpr (!kIsPair<E>) {
      if (few_) {
        for_column_slices(m_, d_, [&](int64_t from, int64_t to) {
          combine_rows(rows, to - from, d_, g.data, g.row_stride, p_.param_dtype,
                       element(p_.param_dtype, p_.up_weight, from), m_, product + from, stride,
                       Mode::overwrite);
        });
        return;
      }
    }
    gemm(rows, m_, units<E>(d_), g.data, g.row_stride, 1, up_.panels(), product, stride, Mode::overwrite);
  }

  // Rows of G as E: grad_out where it lies, if that is the same.
  Tile<E> gradient_rows(int64_t begin, int64_t rows, Scratch& scratch) const {
    const int64_t token = chunk_ + begin, grad_stride = p_.grad_out_row_stride;
    if (!p_.dropout.active()) {
      const Tile<E> g = operand_in_place<E>(p_.dtype, p_.grad_out, token * grad_stride, grad_stride, d_);
      if (g.data != nullptr) return g;
    }
    const int64_t stride = buffer_stride<E>(units<E>(d_));
    E* buffer = scratch.take<E>(rows * stride);
    T* row = scratch.take<T>(d_);
    for (int64_t i = 0; i < rows; ++i) {
      if constexpr (!kIsPair<E>) row = buffer + i * stride;
      gradient_row(token + i, 0, d_, row);
      store_operand(row, d_, buffer + i * stride);
    }
    return {buffer, stride};
  }

  void gradient_row(int64_t token, int64_t j, int64_t n, T* row) const {
    load_row(p_.dtype, p_.grad_out, token * p_.grad_out_row_stride + j, n, row);
    if (p_.dropout.active()) dropout_row(p_.dropout, token, j, n, row);
  }

  // H = act(Z) and dZ = scale (G Wu) * act'(Z), given the product.
  void activation_rows(int64_t begin, int64_t rows, T* product, int64_t stride) const {
    if (!up_wanted_ && !dz_wanted_) return;
    Scratch scratch;
    T* converted = scratch.take<T>(m_);
    T* h_row = scratch.take<T>(sum_stride_);
    const Vec<T> scale = broadcast(static_cast<T>(p_.scale));
    visit_activation(p_.activation, [&](auto activation) {
      for (int64_t i = 0; i < rows; ++i) {
        const T* z = view_row(p_.param_dtype, p_.hidden, (chunk_ + begin + i) * m_, m_, converted);
        T* dz = product + i * stride;
        if constexpr (!kIsPair<E>) h_row = h_ + (begin + i) * h_stride_;
        for (int64_t k = 0; k < m_; k += kLanes<T>) {
          Vec<T> value, slope;
          activate<activation()>(load_columns(z, k, m_), value, slope);
          if (up_wanted_) store(h_row + k, value);
          if (dz_wanted_) store_columns(dz, k, m_, load_columns(dz, k, m_) * slope * scale);
        }
        if (up_wanted_) store_operand(h_row, m_, h_ + (begin + i) * h_stride_);
        if (dz_wanted_) store_operand(dz, m_, dz_ + (begin + i) * dz_stride_);
      }
    });
  }

  // dx = dZ Wd (+ grad_out), a block of columns at a time.
  void input_gradient(int64_t begin, int64_t rows) const {
    const auto blocks = [&](int64_t from, int64_t to) {
      Scratch scratch;
      T* block = scratch.take<T>(rows * kBlockColumns);
      T* converted = scratch.take<T>(kBlockColumns);
      for (int64_t j = from; j < to; j += kBlockColumns) {
        const int64_t columns = minimum(kBlockColumns, to - j);
        times_down_weight(begin, rows, j, columns, block, kBlockColumns);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t token = chunk_ + begin + i;
          store_input_gradient(token, j, columns, block + i * kBlockColumns, converted);
        }
      }
    };
    if (few_) {
      for_column_slices(d_, m_, blocks);
    } else {
      blocks(0, d_);
    }
  }

  // With g = dN w: dx = rstd (g - mean(g) - n mean(g n)) (+ grad_out).
  void input_gradient_with_norm(int64_t begin, int64_t rows) const {
    Scratch scratch;
    const int64_t stride = buffer_stride<T>(d_);
    T* dn = scratch.take<T>(rows * stride);
    T* n = scratch.take<T>(padded<T>(d_));
    if (few_) {
      for_column_slices(d_, m_, [&](int64_t from, int64_t to) {
        times_down_weight(begin, rows, from, to - from, dn + from, stride);
      });
    } else {
      times_down_weight(begin, rows, 0, d_, dn, stride);
    }
    const T width = static_cast<T>(d_);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = chunk_ + begin + i;
      T* row = dn + i * stride;
      normalised_row(token, 0, d_, n);
      for (int64_t j = 0; j < d_; j += kLanes<T>) {
        store_columns(row, j, d_, load_columns(row, j, d_) * load(norm_weight_ + j));
      }
      const T mean_g = sum_columns<T>(d_, [&](int64_t j) { return load_columns(row, j, d_); }) / width;
      const T mean_gn =
          sum_columns<T>(d_, [&](int64_t j) { return load_columns(row, j, d_) * load_columns(n, j, d_); }) /
          width;
      const T rstd = static_cast<const T*>(p_.rstd)[token];
      for (int64_t j = 0; j < d_; j += kLanes<T>) {
        const Vec<T> g = load_columns(row, j, d_), normalised = load_columns(n, j, d_);
        store_columns(row, j, d_, (g - mean_g - normalised * mean_gn) * rstd);
      }
      store_input_gradient(token, 0, d_, row, n);
    }
  }

  // The columns from j on of dZ Wd.
  void times_down_weight(int64_t begin, int64_t rows, int64_t j, int64_t columns, T* result,
                         int64_t stride) const {
    const E* dz = dz_ + begin * dz_stride_;
    if constexpr (!kIsPair<E>) {
      if (few_) {
        combine_rows(rows, columns, m_, dz, dz_stride_, p_.param_dtype,
                     element(p_.param_dtype, p_.down_weight, j), d_, result, stride, Mode::overwrite);
        return;
      }
    }
    gemm(rows, columns, units<E>(m_), dz, dz_stride_, 1, down_.panels(j), result, stride, Mode::overwrite);
  }

  // n = (x - mean) rstd, columns j0 .. j0 + count.
  void normalised_row(int64_t token, int64_t j0, int64_t count, T* n) const {
    const T* x = view_row(p_.dtype, p_.x, token * p_.x_row_stride + j0, count, n);
    const T mean = static_cast<const T*>(p_.mean)[token], rstd = static_cast<const T*>(p_.rstd)[token];
    for (int64_t j = 0; j < count; j += kLanes<T>) {
      store_columns(n, j, count, (load_columns(x, j, count) - mean) * rstd);
    }
  }

  // dx = row, plus grad_out where the residual is x; `converted` and row are scratch of `count` elements.
  void store_input_gradient(int64_t token, int64_t j0, int64_t count, T* row, T* converted) const {
    const int64_t at = token * d_ + j0;
    T* dx = p_.dtype == dtype_of<T>() ? static_cast<T*>(p_.dx) + at : row;
    if (p_.residual_is_x) {
      const T* grad_out =
          view_row(p_.dtype, p_.grad_out, token * p_.grad_out_row_stride + j0, count, converted);
      for (int64_t j = 0; j < count; j += kLanes<T>) {
        store_columns(dx, j, count, load_columns(row, j, count) + load_columns(grad_out, j, count));
      }
    } else if (dx != row) {
      for (int64_t j = 0; j < count; j += kLanes<T>) store_columns(dx, j, count, load_columns(row, j, count));
    }
    if (dx == row) store_row(p_.dtype, row, count, p_.dx, at);
  }

  // ---- second pass: slices of model_dim ----

  int64_t slices() const { return ceil_div(d_, kBlockColumns); }

  void weight_pass() {
    if (!up_wanted_ && !down_wanted_) return;
    const int64_t kinds = up_wanted_ && down_wanted_ ? 2 : 1;
    parallel_for(kinds * slices(), [&](int64_t task) {
      const int64_t j = task / kinds * kBlockColumns, columns = minimum(kBlockColumns, d_ - j);
      Scratch scratch;
      if (up_wanted_ && task % kinds == 0) {
        T* sums = dup_ != nullptr ? dup_ + j * sum_stride_ : scratch.take<T>(columns * sum_stride_);
        add_up_slice(j, columns, sums);
        if (last_) store_up_slice(j, columns, sums);
      } else {
        T* sums =
            ddown_ != nullptr ? ddown_ + j * m_ : scratch.take<T>(sums_wanted_ ? kBlockColumns * m_ : 0);
        if (sums_wanted_) add_down_slice(j, columns, sums);
        if (last_) store_down_slice(j, columns, sums);
      }
    });
  }

  // Rows j .. of G^T H into dup_sums, and the sums of G's columns.
  void add_up_slice(int64_t j, int64_t columns, T* dup_sums) const {
    constexpr int64_t kStride = buffer_stride<T>(kBlockColumns);
    Scratch scratch;
    T* g = scratch.take<T>(kKBlock * kStride);
    T* sums = scratch.take<T>(kStride);
    E* g_panels = scratch.take<E>(kIsPair<E> ? panel_size<E>(units<E>(kKBlock), kBlockColumns) : 0);
    E* h_panels = scratch.take<E>(panel_size<E>(units<E>(kKBlock), m_));
    if (first_) {
      for (int64_t i = 0; i < columns; ++i) dup_bias_[j + i] = T{0};
    }
    for (int64_t t = 0; t < chunk_size_ || (first_ && t == 0); t += kKBlock) {
      const int64_t depth = minimum(kKBlock, chunk_size_ - t);
      for (int64_t i = 0; i < depth; ++i) gradient_row(chunk_ + t + i, j, columns, g + i * kStride);
      column_sums(g, depth, kStride, columns, sums);
      for (int64_t i = 0; i < columns; ++i) dup_bias_[j + i] += sums[i];
      const Mode mode = first_ && t == 0 ? Mode::overwrite : Mode::accumulate;
      const E* h = h_ + t * h_stride_;
      if constexpr (kIsPair<E>) {
        pack_pair_panels(DType::f32, g, kStride, 1, depth, columns, g_panels);
        pack_pair_panels(DType::bf16, h, 2 * h_stride_, 1, depth, m_, h_panels);
        gemm_transposed(columns, m_, depth, g_panels, h_panels, dup_sums, sum_stride_, mode);
      } else {
        // rows of one panel's width are a panel as they lie
        if (m_ > kPanelColumns<T>) pack_panels(dtype_of<T>(), h, h_stride_, 1, depth, m_, h_panels);
        gemm(columns, m_, depth, g, 1, kStride, m_ > kPanelColumns<T> ? h_panels : h, dup_sums, sum_stride_,
             mode);
      }
    }
  }

  // C (+)= A^T B, A and B (depth, rows) and (depth, columns) in panels of pairs.
  static void gemm_transposed(int64_t rows, int64_t columns, int64_t depth, const BFloat16Pair* a,
                              const BFloat16Pair* b, T* c, int64_t ldc, Mode mode) {
    for (int64_t i = 0; i < rows; i += kPanelColumns<E>) {
      const int64_t width = minimum(kPanelColumns<E>, rows - i);
      gemm(width, columns, pairs(depth), a + i * pairs(depth), 1, padded<E>(width), b, c + i * ldc, ldc,
           mode);
    }
  }

  void store_up_slice(int64_t j, int64_t columns, T* dup_sums) const {
    const Vec<T> scale = broadcast(static_cast<T>(p_.scale));
    for (int64_t i = 0; p_.dup_weight != nullptr && i < columns; ++i) {
      const int64_t at = (j + i) * m_;
      T* row = dup_sums + i * sum_stride_;
      T* to = p_.param_dtype == dtype_of<T>() ? static_cast<T*>(p_.dup_weight) + at : row;
      for (int64_t k = 0; k < m_; k += kLanes<T>) store_columns(to, k, m_, load(row + k) * scale);
      if (to == row) store_row(p_.param_dtype, row, m_, p_.dup_weight, at);
    }
    if (p_.dup_bias != nullptr) {
      for (int64_t i = j; i < j + columns; ++i) dup_bias_[i] *= static_cast<T>(p_.scale);
      store_row(p_.param_dtype, dup_bias_ + j, columns, p_.dup_bias, j);
    }
  }

  // Columns j .. of D = dZ^T n, or of dZ^T x where there is no LayerNorm.
  void add_down_slice(int64_t j, int64_t columns, T* sums) const {
    Scratch scratch;
    E* panels = scratch.take<E>(panel_size<E>(units<E>(kKBlock), kBlockColumns));
    E* dz_panels = scratch.take<E>(kIsPair<E> ? panel_size<E>(units<E>(kKBlock), m_) : 0);
    T* normalised = scratch.take<T>(normed_ ? kKBlock * kBlockColumns : 0);
    for (int64_t t = 0; t < chunk_size_ || (first_ && t == 0); t += kKBlock) {
      const int64_t depth = minimum(kKBlock, chunk_size_ - t), token = chunk_ + t;
      if (normed_) {
        for (int64_t i = 0; i < depth; ++i)
          normalised_row(token + i, j, columns, normalised + i * kBlockColumns);
        pack_operand(dtype_of<T>(), normalised, kBlockColumns, 1, depth, columns, panels);
      } else {
        pack_operand(p_.dtype, element(p_.dtype, p_.x, token * p_.x_row_stride + j), p_.x_row_stride, 1,
                     depth, columns, panels);
      }
      const Mode mode = first_ && t == 0 ? Mode::overwrite : Mode::accumulate;
      const E* dz = dz_ + t * dz_stride_;
      if constexpr (kIsPair<E>) {
        pack_pair_panels(DType::bf16, dz, 2 * dz_stride_, 1, depth, m_, dz_panels);
        gemm_transposed(m_, columns, depth, dz_panels, panels, sums, kBlockColumns, mode);
      } else {
        gemm(m_, columns, depth, dz, 1, dz_stride_, panels, sums, kBlockColumns, mode);
      }
    }
  }

  void store_down_slice(int64_t j, int64_t columns, T* sums) const {
    Scratch scratch;
    T* row = scratch.take<T>(kBlockColumns);
    if (p_.dnorm_bias != nullptr) {
      combine_rows(1, columns, m_, ddown_bias_, sum_stride_, p_.param_dtype,
                   element(p_.param_dtype, p_.down_weight, j), d_, row, kBlockColumns, Mode::overwrite);
      store_row(p_.param_dtype, row, columns, p_.dnorm_bias, j);
    }
    if (p_.dnorm_weight != nullptr) {
      T* total = scratch.take<T>(kBlockColumns);
      for (int64_t i = 0; i < columns; ++i) total[i] = T{0};
      for (int64_t k = 0; k < m_; ++k) {
        const T* weight = view_row(p_.param_dtype, p_.down_weight, k * d_ + j, columns, row);
        for (int64_t i = 0; i < columns; ++i) total[i] += weight[i] * sums[k * kBlockColumns + i];
      }
      store_row(p_.param_dtype, total, columns, p_.dnorm_weight, j);
    }
    if (p_.ddown_weight != nullptr) {
      for (int64_t k = 0; k < m_; ++k) {
        T* gradient = sums + k * kBlockColumns;
        if (normed_) {
          const T bias_sum = ddown_bias_[k];
          for (int64_t i = 0; i < columns; ++i) {
            gradient[i] = gradient[i] * norm_weight_[j + i] + bias_sum * norm_bias_[j + i];
          }
        }
        store_row(p_.param_dtype, gradient, columns, p_.ddown_weight, k * d_ + j);
      }
    }
  }

  // The sums of `columns` columns of a few hundred rows at most: eight interleaved sums, for speed and for accuracy.
  static void column_sums(const T* rows, int64_t count, int64_t stride, int64_t columns, T* sums) {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const auto load_at = [&](int64_t i) { return load_columns(rows + i * stride, j, columns); };
      Vec<T> parts[8] = {};
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) {
#pragma GCC unroll 8
        for (int part = 0; part < 8; ++part) parts[part] += load_at(i + part);
      }
      for (; i < count; ++i) parts[i % 8] += load_at(i);
      store_columns(
          sums, j, columns,
          ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7])));
    }
  }

  const AdapterBackward& p_;
  const int64_t d_, m_;
  const bool few_, normed_;
  const bool up_wanted_, sums_wanted_, down_wanted_, dz_wanted_;
  const int64_t dz_stride_, h_stride_;  // of E
  const int64_t sum_stride_;            // of T: rows of bottleneck sums
  Scratch scratch_;
  const T* norm_weight_;
  const T* norm_bias_;
  const PackedWeight<E> up_, down_;

  // one chunk
  int64_t chunk_ = 0, chunk_size_ = 0;  // its first token, its tokens
  bool first_ = true, last_ = true;
  TokenTiles tiles_{};
  E* dz_ = nullptr;         // (chunk, bottleneck)
  E* h_ = nullptr;          // (chunk, bottleneck)
  T* tile_sums_ = nullptr;  // (tiles, bottleneck): sums of dZ over a tile

  // all of them
  T* ddown_bias_ = nullptr;  // (bottleneck)
  T* dup_bias_ = nullptr;    // (model_dim), before the scale
  T* dup_ = nullptr;         // (model_dim, bottleneck), before the scale; null if one chunk is all
  T* ddown_ = nullptr;       // [slice of model_dim][bottleneck][kBlockColumns]: D; likewise
};

}  // namespace

void adapter_backward(const AdapterBackward& p) { run_by_dtype<Backward>(p); }

}  // namespace lwft::LWFT_ISA
