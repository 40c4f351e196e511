// Attention on an x86 CPU with AVX-512, exact, not causal, in float32 or (AVX-512 BF16) bfloat16.
//
// One pass over the scores: a tile of them is made in registers, turned into exponentials there,
// rounded to the inputs' dtype and multiplied again out of the first-level cache. Products add up
// in float32 over words of 32 bits, each one float32 or two bfloat16, of two channels or two
// tokens: one operand broadcasts a row's words, the other is laid out in vectors of words first,
// in a pass over the tokens, not over the scores.
//
// Forward: a row is a query, lanes are keys. Backward: a row is a key, lanes are queries, and the
// gradient of the queries is summed transposed. Exponentials are powers of two of scale * score +
// bias; the bias makes zeros of lanes behind a sequence's end and in the backward is minus the
// log-sum-exp. The forward subtracts no maximum: its caller looks at the log-sum-exp.
//
// With a table q and k are turned by it as they are read, and their gradients back as they are
// written, each once.
//
// Threads are OpenMP's, of the runtime that PyTorch has loaded. A task is a head's cut of queries
// in the forward, a head in the backward; no sum crosses tasks, so threads change no bit.
//
// Shapes: C head channels; a template's K is the kind of value.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "../lanes.h"

namespace {

constexpr int ROWS = 6;  // with 4 vectors of sums each, what registers hold
constexpr int NARROW = 2 * LANES, WIDE = 4 * LANES;
constexpr int QUERIES = 96;  // most of a forward's task
constexpr int KEYS = 48;     // whose gradients a backward sums at once
constexpr float ZEROED = -1e30f;

constexpr int up(int count, int step) { return (count + step - 1) / step * step; }

// Words of a row that holds `count`: whole vectors, an odd number of them, so that rows below each
// other fall into different sets of the first-level cache.
constexpr int pitch(int count) { return up(count, LANES) | LANES; }

using Room = std::unique_ptr<uint32_t, decltype(&std::free)>;

Room make_room(int64_t words) {
  return {static_cast<uint32_t*>(std::aligned_alloc(64, words * 4)), &std::free};
}

// To 7.5e-8 of itself, by the best polynomial on [-1/2, 1/2].
INLINE Lanes power_of_two(Lanes x) {
  constexpr float factors[] = {1.32764718e-3f, 9.67554133e-3f, 5.55071327e-2f,
                               2.40221197e-1f, 6.93146967e-1f, 1.00000007f};
  Lanes whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Lanes rest = _mm512_sub_ps(x, whole), power = _mm512_set1_ps(factors[0]);
  UNROLL for (int i = 1; i < 6; ++i)
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(factors[i]));
  return _mm512_scalef_ps(power, whole);
}

struct Float32 {
  using Value = float;
  static constexpr int IN_A_WORD = 1;

  static INLINE Lanes add_product(Lanes sum, Words a, Words b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static INLINE Lanes load(const Value* from) { return _mm512_loadu_ps(from); }
  static INLINE void store(Value* to, Lanes first, Lanes second) {
    _mm512_storeu_ps(to, first);
    _mm512_storeu_ps(to + LANES, second);
  }
  // Words of two rows' values, side by side; of one row where it fills them.
  static INLINE Words along(const Value* row, const Value*) { return _mm512_loadu_si512(row); }
};

struct Bfloat16 {
  using Value = uint16_t;
  static constexpr int IN_A_WORD = 2;

  static INLINE Lanes add_product(Lanes sum, Words a, Words b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static INLINE Lanes load(const Value* from) {
    Words words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }
  static INLINE void store(Value* to, Lanes first, Lanes second) {
    _mm512_storeu_si512(to, (Words)_mm512_cvtne2ps_pbh(second, first));
  }
  static INLINE Words along(const Value* row, const Value* next) {
    Words low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)row));
    Words high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)next));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
};

// One head of a tensor: rows of channels, `step` values apart. Behind the last lie zeros.
template <class K>
struct Rows {
  typename K::Value* at;
  int64_t step;
  int length;

  typename K::Value* operator[](int row) const {
    alignas(64) static typename K::Value zeros[128] = {};
    return row < length ? at + row * step : zeros;
  }
};

template <class K>
Rows<K> rows_of(const View& view, int64_t b, int64_t h, int length) {
  return {view.of<typename K::Value>(b, h), view.token, length};
}

// A sequence's cosines and sines of channel pairs, C floats a token; none where nothing turns.
struct Turns {
  const float* at;
  int64_t step;

  explicit operator bool() const { return at; }
  const float* operator[](int row) const { return at ? at + row * step : nullptr; }
};

// The same of all sequences [B or 1, K, C]; none at null.
struct Table {
  const float* at;
  int64_t batch, token;

  Turns of(int64_t b) const { return {at ? at + b * batch : nullptr, token}; }
};

// Channel pairs turned by `factors`; signs: set where the neighbour's share is taken away.
INLINE Lanes turned(Lanes pairs, const float* factors, Lanes signs) {
  Lanes by = _mm512_loadu_ps(factors);
  Lanes other = _mm512_mul_ps(_mm512_permute_ps(pairs, 0xb1), _mm512_movehdup_ps(by));
  return _mm512_fmadd_ps(pairs, _mm512_moveldup_ps(by), _mm512_xor_ps(other, signs));
}

// From the first of a pair, or on the way back from the second.
INLINE Lanes signs(bool back) {
  return _mm512_castsi512_ps(_mm512_set1_epi64(back ? INT64_MIN : int64_t(1) << 31));
}

// Rows `low` to `high`, turned, in `room`; where nothing turns, where they are.
template <class K, int C>
Rows<K> turned_rows(Rows<K> from, Turns turns, int low, int high, typename K::Value* room) {
  if (!turns) return {from.at + low * from.step, from.step, high - low};
  for (int row = low; row < high; ++row)
    for (int c = 0; c < C; c += NARROW) {
      Lanes first = K::load(from[row] + c), second = K::load(from[row] + c + LANES);
      K::store(room + (row - low) * C + c, turned(first, turns[row] + c, signs(false)),
               turned(second, turns[row] + c + LANES, signs(false)));
    }
  return {room, C, high - low};
}

void transpose(Words r[LANES]) {
  Words t[LANES];
  UNROLL for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// `rows` rows of `words` words as columns, [words][pitch(rows)].
template <class K>
void lay_out_columns(Rows<K> from, int words, int rows, uint32_t* to) {
  int apart = pitch(rows);
  for (int word = 0; word < words; word += LANES)
    for (int row = 0; row < rows; row += LANES) {
      Words r[LANES];
      UNROLL for (int i = 0; i < LANES; ++i)
        r[i] = _mm512_loadu_si512(from[row + i] + K::IN_A_WORD * word);
      transpose(r);
      UNROLL for (int i = 0; i < LANES; ++i)
        _mm512_storeu_si512(to + int64_t(word + i) * apart + row, r[i]);
    }
}

// Words along `rows` tokens, [rows / IN_A_WORD][C].
template <class K, int C>
void lay_out_along(Rows<K> from, int rows, uint32_t* to) {
  for (int row = 0; row < rows; row += K::IN_A_WORD)
    for (int c = 0; c < C; c += LANES, to += LANES)
      _mm512_storeu_si512(to, K::along(from[row] + c, from[row + 1] + c));
}

// sums += words of `rows`, each broadcast, times vectors that lie `step` words apart.
template <class K, int R, int V>
INLINE void add_products(Lanes (&sums)[R][V], const typename K::Value* const* rows, int words,
                         const uint32_t* vectors, int64_t step) {
  _Pragma("GCC unroll 2") for (int n = 0; n < words; ++n) {
    Words vector[V];
    UNROLL for (int i = 0; i < V; ++i)
      vector[i] = _mm512_loadu_si512(vectors + n * step + i * LANES);
    UNROLL for (int r = 0; r < R; ++r) {
      int32_t word;
      std::memcpy(&word, rows[r] + K::IN_A_WORD * n, 4);
      UNROLL for (int i = 0; i < V; ++i)
        sums[r][i] = K::add_product(sums[r][i], _mm512_set1_epi32(word), vector[i]);
    }
  }
}

// The same on sums in memory, whose rows lie `apart` floats apart; added up by themselves first, so
// that no chain of roundings is as long as a sequence.
template <class K, int R, int V>
void add_products_to(float* sums, int64_t apart, const typename K::Value* const* rows, int words,
                     const uint32_t* vectors, int64_t step) {
  Lanes s[R][V] = {};
  add_products<K, R, V>(s, rows, words, vectors, step);
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int i = 0; i < V; ++i) {
      float* place = sums + r * apart + i * LANES;
      _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), s[r][i]));
    }
}

template <class K, int C>
void write_row(const float* from, float scale, typename K::Value* to) {
  Lanes by = _mm512_set1_ps(scale);
  for (int c = 0; c < C; c += NARROW)
    K::store(to + c, _mm512_mul_ps(_mm512_loadu_ps(from + c), by),
             _mm512_mul_ps(_mm512_loadu_ps(from + c + LANES), by));
}

// The gradient of rows `low` to `high`, which lie `apart` floats apart, turned back where there are
// `turns`; adds its sum over the rows to `sum` [C].
template <class K, int C>
void write_gradient(const float* from, int apart, float scale, Turns turns, int low, int high,
                    Rows<K> to, float* sum) {
  Lanes by = _mm512_set1_ps(scale), sums[C / LANES] = {};
  for (int row = low; row < high; ++row, from += apart)
    for (int c = 0; c < C; c += NARROW) {
      Lanes x[2];
      UNROLL for (int i = 0; i < 2; ++i) {
        x[i] = _mm512_mul_ps(_mm512_loadu_ps(from + c + i * LANES), by);
        if (turns) x[i] = turned(x[i], turns[row] + c + i * LANES, signs(true));
        sums[c / LANES + i] = _mm512_add_ps(sums[c / LANES + i], x[i]);
      }
      K::store(to[row] + c, x[0], x[1]);
    }
  for (int c = 0; c < C; c += LANES)
    _mm512_storeu_ps(sum + c, _mm512_add_ps(_mm512_loadu_ps(sum + c), sums[c / LANES]));
}

// Vectors of channels whose sums ROWS rows hold in registers.
template <int C>
constexpr int CHANNELS = C / LANES < 4 ? C / LANES : 4;

// One tile of the forward, ROWS queries by V vectors of keys: adds to `out` [ROWS][C] and, by
// lanes, to `totals`.
template <class K, int C, int V>
void attend_tile(const typename K::Value* const* q, const uint32_t* k, int64_t apart,
                 const uint32_t* v, const float* bias, float scale, float* out, Lanes* totals) {
  Lanes s[ROWS][V] = {}, by = _mm512_set1_ps(scale);
  add_products<K, ROWS, V>(s, q, C / K::IN_A_WORD, k, apart);
  alignas(64) typename K::Value e[ROWS][V * LANES];
  const typename K::Value* rows[ROWS];
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int i = 0; i < V; ++i) {
      s[r][i] = power_of_two(_mm512_fmadd_ps(s[r][i], by, _mm512_loadu_ps(bias + i * LANES)));
      totals[r] = _mm512_add_ps(totals[r], s[r][i]);
    }
    UNROLL for (int i = 0; i < V; i += 2) K::store(e[r] + i * LANES, s[r][i], s[r][i + 1]);
    rows[r] = e[r];
  }
  for (int c = 0; c < C; c += CHANNELS<C> * LANES)
    add_products_to<K, ROWS, CHANNELS<C>>(out + c, C, rows, V * LANES / K::IN_A_WORD, v + c, C);
}

template <class K, int C>
void attend(Rows<K> all, Turns turns, int low, int high, const uint32_t* k, const uint32_t* v,
            int keys, const float* bias, float scale, Rows<K> out, float* lse) {
  alignas(64) float sums[QUERIES * C] = {};
  alignas(64) typename K::Value room[QUERIES * C];
  Rows<K> q = turned_rows<K, C>(all, turns, low, high, room);
  Lanes totals[QUERIES];
  std::fill(totals, totals + QUERIES, _mm512_setzero_ps());
  for (int key = 0; key < keys;) {
    bool wide = keys - key >= WIDE;
    auto tile = wide ? attend_tile<K, C, 4> : attend_tile<K, C, 2>;
    for (int row = 0; row < q.length; row += ROWS) {
      const typename K::Value* rows[ROWS];
      for (int r = 0; r < ROWS; ++r) rows[r] = q[row + r];
      tile(rows, k + key, pitch(keys), v + int64_t(key / K::IN_A_WORD) * C, bias + key, scale,
           sums + row * C, totals + row);
    }
    key += wide ? WIDE : NARROW;
  }
  for (int row = low; row < high; ++row) {
    float total = _mm512_reduce_add_ps(totals[row - low]);
    lse[row] = std::log(total);
    write_row<K, C>(sums + (row - low) * C, 1 / total, out[row]);
  }
}

template <class K, int C>
int forward(View q, View k, View v, Table table, View out, float* lse, int batch, int heads,
            int length, int threads) {
  int keys = up(length, NARROW), cuts = (length + QUERIES - 1) / QUERIES;
  int queries = up((length + cuts - 1) / cuts, ROWS);
  int64_t all = int64_t(batch) * heads, words = int64_t(pitch(keys)) * C / K::IN_A_WORD;
  Room room = make_room(2 * all * words);
  float scale = float(M_LOG2E / std::sqrt(double(C)));
  std::unique_ptr<float[]> bias(new (std::nothrow) float[keys]);
  if (!room || !bias) return OUT_OF_MEMORY;
  for (int n = 0; n < keys; ++n) bias[n] = n < length ? 0 : ZEROED;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t i = 0; i < all; ++i) {
      int64_t b = i / heads, h = i % heads;
      uint32_t *columns = room.get() + 2 * i * words, *along = columns + words;
      auto own = reinterpret_cast<typename K::Value*>(along);  // till v comes
      lay_out_columns<K>(
          turned_rows<K, C>(rows_of<K>(k, b, h, length), table.of(b), 0, length, own),
          C / K::IN_A_WORD, keys, columns);
      lay_out_along<K, C>(rows_of<K>(v, b, h, length), keys, along);
    }
#pragma omp for collapse(2)
    for (int64_t i = 0; i < all; ++i)
      for (int cut = 0; cut < cuts; ++cut) {
        int64_t b = i / heads, h = i % heads;
        int low = cut * queries, high = std::min(low + queries, length);
        attend<K, C>(rows_of<K>(q, b, h, length), table.of(b), low, high,
                     room.get() + 2 * i * words, room.get() + (2 * i + 1) * words, keys,
                     bias.get(), scale, rows_of<K>(out, b, h, length), lse + i * length);
      }
  }
  return DONE;
}

// What a backward's thread works with: a head's tensors, laid out for its products, and sums.
template <class K, int C>
struct Head {
  using Value = typename K::Value;
  int queries, keys, queries_apart, keys_apart;
  uint32_t *q_columns, *grad_columns;  // [words of C][queries]
  uint32_t *q_along, *grad_along;      // [words of queries][C]
  uint32_t *k_along, *k_columns;       // [words of keys][C], [C][words of keys]
  Value *q, *k;                        // turned, [length][C]
  float *dq, *bias, *shift;            // [C][queries], [queries], [queries]
  alignas(64) float dk[KEYS * C], dv[KEYS * C];
  alignas(64) Value p[KEYS][WIDE], ds[KEYS][WIDE];
  alignas(64) uint32_t ds_along[KEYS / K::IN_A_WORD][WIDE];
  Room room{nullptr, &std::free};

  explicit Head(int length)
      : queries(up(length, NARROW)), keys(up(length, KEYS)), queries_apart(pitch(queries)),
        keys_apart(pitch(keys / K::IN_A_WORD)) {
    int64_t of_queries = int64_t(queries_apart) * C / K::IN_A_WORD;
    int64_t of_keys = int64_t(keys_apart) * C, of_sums = int64_t(queries_apart) * C;
    room = make_room(6 * of_queries + 2 * of_keys + of_sums + 2 * queries_apart);
    uint32_t* next = room.get();
    auto take = [&](auto*& place, int64_t words) {
      place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(next);
      next += words;
    };
    for (auto place : {&q_columns, &grad_columns, &q_along, &grad_along}) take(*place, of_queries);
    for (auto place : {&q, &k}) take(*place, of_queries);
    for (auto place : {&k_along, &k_columns}) take(*place, of_keys);
    take(dq, of_sums);
    for (auto place : {&bias, &shift}) take(*place, queries_apart);
  }
};

// Exponentials and the scores' gradient of ROWS keys and NARROW queries, to p, ds and ds_along.
template <class K, int C>
void tile_of_scores(Head<K, C>& head, Rows<K> k, Rows<K> v, int key, int row, int query, int at,
                    float scale) {
  constexpr int V = NARROW / LANES;
  const typename K::Value *k_rows[ROWS], *v_rows[ROWS];
  for (int r = 0; r < ROWS; ++r) k_rows[r] = k[key + row + r], v_rows[r] = v[key + row + r];
  Lanes p[ROWS][V] = {}, ds[ROWS][V] = {}, by = _mm512_set1_ps(scale);
  add_products<K, ROWS, V>(p, k_rows, C / K::IN_A_WORD, head.q_columns + query, head.queries_apart);
  int rest = k.length - key - row;
  if (rest < ROWS)  // the exponential of no score may be infinite
    UNROLL for (int r = 0; r < ROWS; ++r)
      UNROLL for (int i = 0; i < V; ++i)
        if (r >= rest) p[r][i] = _mm512_set1_ps(ZEROED);
  UNROLL for (int i = 0; i < V; ++i) {
    Lanes bias = _mm512_loadu_ps(head.bias + query + i * LANES);
    UNROLL for (int r = 0; r < ROWS; ++r)
      p[r][i] = power_of_two(_mm512_fmadd_ps(p[r][i], by, bias));
  }
  UNROLL for (int r = 0; r < ROWS; ++r) K::store(head.p[row + r] + at, p[r][0], p[r][1]);
  add_products<K, ROWS, V>(ds, v_rows, C / K::IN_A_WORD, head.grad_columns + query,
                           head.queries_apart);
  UNROLL for (int i = 0; i < V; ++i) {
    Lanes shift = _mm512_loadu_ps(head.shift + query + i * LANES);
    UNROLL for (int r = 0; r < ROWS; ++r)
      ds[r][i] = _mm512_mul_ps(p[r][i], _mm512_sub_ps(ds[r][i], shift));
  }
  UNROLL for (int r = 0; r < ROWS; ++r) K::store(head.ds[row + r] + at, ds[r][0], ds[r][1]);
  UNROLL for (int r = 0; r < ROWS; r += K::IN_A_WORD)
    UNROLL for (int i = 0; i < V; ++i) {
      int place = at + i * LANES, next = row + r + K::IN_A_WORD - 1;
      _mm512_store_si512(head.ds_along[(row + r) / K::IN_A_WORD] + place,
                         K::along(head.ds[row + r] + place, head.ds[next] + place));
    }
}

// Adds what up to KEYS keys, in steps of ROWS, and up to WIDE queries give to the gradients of both.
template <class K, int C>
void add_gradients(Head<K, C>& head, Rows<K> k, Rows<K> v, int key, int keys, int query, int width,
                   float scale) {
  for (int at = 0; at < width; at += NARROW)
    for (int row = 0; row < keys; row += ROWS)
      tile_of_scores<K, C>(head, k, v, key, row, query + at, at, scale);
  for (int row = 0; row < keys; row += ROWS) {
    const typename K::Value *p[ROWS], *ds[ROWS];
    for (int r = 0; r < ROWS; ++r) p[r] = head.p[row + r], ds[r] = head.ds[row + r];
    for (int c = 0; c < C; c += CHANNELS<C> * LANES) {
      int64_t place = int64_t(query / K::IN_A_WORD) * C + c;
      int words = width / K::IN_A_WORD;
      add_products_to<K, ROWS, CHANNELS<C>>(head.dv + row * C + c, C, p, words,
                                            head.grad_along + place, C);
      add_products_to<K, ROWS, CHANNELS<C>>(head.dk + row * C + c, C, ds, words,
                                            head.q_along + place, C);
    }
  }
  constexpr int COLUMNS = 8;
  for (int at = 0; at < width; at += NARROW)
    for (int c = 0; c < C; c += COLUMNS) {
      const typename K::Value* columns[COLUMNS];
      for (int i = 0; i < COLUMNS; ++i)
        columns[i] = reinterpret_cast<typename K::Value*>(
            head.k_columns + int64_t(c + i) * head.keys_apart + key / K::IN_A_WORD);
      add_products_to<K, COLUMNS, NARROW / LANES>(
          head.dq + int64_t(c) * head.queries_apart + query + at, head.queries_apart, columns,
          keys / K::IN_A_WORD, head.ds_along[0] + at, WIDE);
    }
}

template <class K, int C>
void lay_out(Head<K, C>& head, Rows<K> grad, Rows<K> q, Rows<K> k, Rows<K> out,
             const float* lse) {
  constexpr int WORDS = C / K::IN_A_WORD;
  lay_out_columns<K>(q, WORDS, head.queries, head.q_columns);
  lay_out_columns<K>(grad, WORDS, head.queries, head.grad_columns);
  lay_out_along<K, C>(q, head.queries, head.q_along);
  lay_out_along<K, C>(grad, head.queries, head.grad_along);
  lay_out_along<K, C>(k, head.keys, head.k_along);
  int along = head.keys / K::IN_A_WORD;
  Rows<Float32> words{reinterpret_cast<float*>(head.k_along), C, along};
  lay_out_columns<Float32>(words, C, along, head.k_columns);
  for (int n = 0; n < head.queries; ++n) {
    Lanes sum = _mm512_setzero_ps();
    for (int c = 0; c < C; c += LANES * K::IN_A_WORD)
      sum = K::add_product(sum, _mm512_loadu_si512(grad[n] + c), _mm512_loadu_si512(out[n] + c));
    head.shift[n] = _mm512_reduce_add_ps(sum);
    head.bias[n] = n < out.length ? float(-M_LOG2E) * lse[n] : ZEROED;
  }
}

// sum_3C: of the three gradients over the tokens.
template <class K, int C>
void backward_of_head(Head<K, C>& head, Rows<K> grad, Rows<K> q, Rows<K> k, Rows<K> v,
                      Turns turns, Rows<K> out, const float* lse, Rows<K> dq, Rows<K> dk,
                      Rows<K> dv, float* sum_3C) {
  int length = q.length;
  q = turned_rows<K, C>(q, turns, 0, length, head.q);
  k = turned_rows<K, C>(k, turns, 0, length, head.k);
  std::fill(sum_3C, sum_3C + 3 * C, 0.0f);
  float scale = float(1 / std::sqrt(double(C)));
  lay_out<K, C>(head, grad, q, k, out, lse);
  std::fill(head.dq, head.dq + int64_t(head.queries_apart) * C, 0.0f);
  for (int key = 0; key < length; key += KEYS) {
    int keys = up(std::min(KEYS, length - key), ROWS);
    std::fill(head.dk, head.dk + KEYS * C, 0.0f);
    std::fill(head.dv, head.dv + KEYS * C, 0.0f);
    for (int query = 0; query < head.queries; query += WIDE)
      add_gradients<K, C>(head, k, v, key, keys, query, std::min(WIDE, head.queries - query),
                          float(M_LOG2E) * scale);
    int stop = std::min(key + KEYS, length);
    write_gradient<K, C>(head.dk, C, scale, turns, key, stop, dk, sum_3C + C);
    write_gradient<K, C>(head.dv, C, 1, {}, key, stop, dv, sum_3C + 2 * C);
  }
  for (int n = 0; n < length; n += LANES) {
    alignas(64) uint32_t rows[LANES * pitch(C)];
    lay_out_columns<Float32>({head.dq + n, head.queries_apart, C}, LANES, C, rows);
    write_gradient<K, C>(reinterpret_cast<float*>(rows), pitch(C), scale, turns, n,
                         std::min(n + LANES, length), dq, sum_3C);
  }
}

template <class K, int C>
int backward(View grad, View q, View k, View v, Table table, View out, const float* lse, View dq,
             View dk, View dv, float* sum_3HC, int batch, int heads, int length, int threads) {
  std::unique_ptr<float[]> sums(new (std::nothrow) float[int64_t(batch) * heads * 3 * C]);
  if (!sums) return OUT_OF_MEMORY;
  int result = DONE;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<Head<K, C>> head(new (std::nothrow) Head<K, C>(length));
    if (!head || !head->room) {
#pragma omp atomic write
      result = OUT_OF_MEMORY;
    }
#pragma omp barrier
#pragma omp for
    for (int64_t i = 0; i < int64_t(batch) * heads; ++i) {
      if (result != DONE) continue;
      auto of = [&](const View& view) { return rows_of<K>(view, i / heads, i % heads, length); };
      backward_of_head<K, C>(*head, of(grad), of(q), of(k), of(v), table.of(i / heads), of(out),
                             lse + i * length, of(dq), of(dk), of(dv), sums.get() + i * 3 * C);
    }
  }
  if (sum_3HC && result == DONE)
    for (int part = 0; part < 3; ++part)
      for (int h = 0; h < heads; ++h)
        for (int c = 0; c < C; ++c) {
          double sum = 0;
          for (int64_t b = 0; b < batch; ++b) sum += sums[((b * heads + h) * 3 + part) * C + c];
          sum_3HC[(int64_t(part) * heads + h) * C + c] = float(sum);
        }
  return result;
}

// Head channels that are not among these give 1 and nothing else. lse: [B, H, K]; sum_3HC: of the
// gradients over all tokens, if asked for.
#define FOR_CHANNELS(CALL)                   \
  switch (channels) {                        \
    case 32: return CALL(32);                \
    case 64: return CALL(64);                \
    case 128: return CALL(128);              \
    default: return 1;                       \
  }

template <class K>
int forward_of(View q, View k, View v, Table table, View out, float* lse, int batch, int heads,
               int length, int channels, int threads) {
#define CALL(C) forward<K, C>(q, k, v, table, out, lse, batch, heads, length, threads)
  FOR_CHANNELS(CALL)
#undef CALL
}

template <class K>
int backward_of(View grad, View q, View k, View v, Table table, View out, const float* lse, View dq,
                View dk, View dv, float* sum_3HC, int batch, int heads, int length, int channels,
                int threads) {
#define CALL(C)                                                                            \
  backward<K, C>(grad, q, k, v, table, out, lse, dq, dk, dv, sum_3HC, batch, heads, length, \
                 threads)
  FOR_CHANNELS(CALL)
#undef CALL
}

}  // namespace

extern "C" {

int forward(int values, View q, View k, View v, Table table, View out, float* lse, int batch,
            int heads, int length, int channels, int threads) {
  auto run = values == 1 ? forward_of<Float32> : forward_of<Bfloat16>;
  return run(q, k, v, table, out, lse, batch, heads, length, channels, threads);
}

int backward(int values, View grad, View q, View k, View v, Table table, View out, const float* lse,
             View dq, View dk, View dv, float* sum_3HC, int batch, int heads, int length,
             int channels, int threads) {
  auto run = values == 1 ? backward_of<Float32> : backward_of<Bfloat16>;
  return run(grad, q, k, v, table, out, lse, dq, dk, dv, sum_3HC, batch, heads, length, channels,
             threads);
}

}
