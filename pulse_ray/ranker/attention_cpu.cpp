// Attention of packed rows on a CPU, without gradients. Scores do not leave the cache, and rows are neither padded nor
// gathered.
//
// For each row and key head, the prompt's keys and values are laid out for products once. The queries of all heads that
// share them follow in blocks of ROWS: a block's scores, their softmax and the sum of values are done before the next.
// Scores and sums are float32. Bfloat16 is multiplied as such by processors with AVX512-BF16, and as float32 by others.
// Products keep sums in registers and read panels that lie in their order (Goto and van de Geijn, 2008).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

// Sums of ROWS · STRIPS registers, of LANES numbers each, are under way: most that there are.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12, STRIPS = 2;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6, STRIPS = 2;
#else
constexpr int LANES = 4, ROWS = 6, STRIPS = 2;
#endif
static_assert(16 % LANES == 0, "attention_cpu.SIZES");
constexpr int64_t BLOCK = 16;   // Tokens of a prompt that are one piece of work.
constexpr int64_t ABSENT = -1;  // `packing.PAD`

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct Bfloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void from_float(float value, float& x) { x = value; }
inline void from_float(float value, Bfloat16& x) {  // To the nearest, to even if there are two.
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    x.bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What products take: float32, or pairs of bfloat16 where the processor multiplies those.
template <class T>
struct Products {
    typedef float Element;
};
#if defined(__AVX512BF16__)
template <>
struct Products<Bfloat16> {
    typedef Bfloat16 Element;
};
#endif
template <class E>
constexpr int PAIR = sizeof(float) / sizeof(E);  // Neighbours in depth that lie together in a panel.

template <class From>
inline void convert(From from, float& to) {
    to = to_float(from);
}
inline void convert(Bfloat16 from, Bfloat16& to) { to = from; }

inline void multiply(const float* a, const float* b, Floats& sum) { sum += *a * load(b); }
#if defined(__AVX512BF16__)
inline void multiply(const Bfloat16* a, const Bfloat16* b, Floats& sum) {
    int32_t pair;
    std::memcpy(&pair, a, 4);
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(b));
}
#endif

// c[ROWS, COUNT strips] (+)= a[ROWS, depth] · panel[depth, COUNT strips]. A strip of a panel is [depth, LANES], and of
// bfloat16 [depth / 2, LANES, 2].
template <int COUNT, class E>
inline void strips(const E* a, int64_t a_stride, const E* panel, int64_t strip, int64_t depth, float* c,
                   int64_t c_stride, bool add) {
    Floats sums[ROWS][COUNT];
    for (int row = 0; row < ROWS; row++)
        for (int s = 0; s < COUNT; s++) sums[row][s] = add ? load(c + row * c_stride + s * LANES) : Floats{};
    for (int64_t k = 0; k < depth; k += PAIR<E>)
        for (int row = 0; row < ROWS; row++)
            for (int s = 0; s < COUNT; s++)
                multiply(a + row * a_stride + k, panel + s * strip + k * LANES, sums[row][s]);
    for (int row = 0; row < ROWS; row++)
        for (int s = 0; s < COUNT; s++) store(c + row * c_stride + s * LANES, sums[row][s]);
}

template <class E>
void product(const E* a, int64_t a_stride, const E* panel, int64_t panel_depth, int64_t depth, int64_t columns,
             float* c, int64_t c_stride, bool add) {
    const int64_t strip = panel_depth * LANES;
    int64_t column = 0;
    for (; column + STRIPS * LANES <= columns; column += STRIPS * LANES)
        strips<STRIPS>(a, a_stride, panel + column * panel_depth, strip, depth, c + column, c_stride, add);
    for (; column < columns; column += LANES)
        strips<1>(a, a_stride, panel + column * panel_depth, strip, depth, c + column, c_stride, add);
}

// Keys as strips of keys, values as strips of dimensions. What a last strip or pair lacks is zero.
template <class T, class E>
void lay_keys(const T* keys, int64_t stride, int64_t length, int64_t size, E* panel) {
    for (int64_t first = 0; first < length; first += LANES)
        for (int64_t d = 0; d < size; d += PAIR<E>, panel += LANES * PAIR<E>)
            for (int lane = 0; lane < LANES; lane++)
                for (int p = 0; p < PAIR<E>; p++)
                    convert(first + lane < length ? keys[(first + lane) * stride + d + p] : T{},
                            panel[lane * PAIR<E> + p]);
}

template <class T, class E>
void lay_values(const T* values, int64_t stride, int64_t length, int64_t size, E* panel) {
    for (int64_t first = 0; first < size; first += LANES)
        for (int64_t key = 0; key < length; key += PAIR<E>, panel += LANES * PAIR<E>)
            for (int p = 0; p < PAIR<E>; p++)
                for (int lane = 0; lane < LANES; lane++)
                    convert(key + p < length ? values[(key + p) * stride + first + lane] : T{},
                            panel[lane * PAIR<E> + p]);
}

// 2^x for x <= 0, 0 below 2^-126. A whole number by the exponent's bits, the rest by Taylor's series (error 2e-7).
inline Floats exp2(Floats x) {
    const Floats magic = Floats{} + 12582912.f;  // 1.5 · 2^23: what is added to it is rounded.
    const Ints kept = ~(x < -126.f);             // What is not a number stays so.
    const Floats clamped = x < -126.f ? Floats{} - 126.f : x;
    const Floats shifted = clamped + magic, rest = clamped - (shifted - magic);
    Floats y = Floats{} + 1.5403530e-4f;
    y = y * rest + 1.3333558e-3f;
    y = y * rest + 9.6181291e-3f;
    y = y * rest + 5.5504109e-2f;
    y = y * rest + 2.4022651e-1f;
    y = y * rest + 6.9314718e-1f;
    y = y * rest + 1.f;
    const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;
    return (Floats)((Ints)(y * (Floats)power) & kept);
}

inline void put_weights(Floats x, float* to) { store(to, x); }
#if defined(__AVX512BF16__)
inline void put_weights(Floats x, Bfloat16* to) {
    const __m256bh narrow = _mm512_cvtneps_pbh(x);
    std::memcpy(to, &narrow, sizeof narrow);
}
#endif

// exp(scaling · (scores - largest)) of each row to `weights`, and the sums of those. Scores of -inf count nothing.
template <class E>
void soften(const float* scores, int64_t width, float scaling, E* weights, float* sums) {
    const float factor = scaling * 1.44269504f;
    for (int row = 0; row < ROWS; row++, scores += width, weights += width) {
        Floats most = load(scores);
        for (int64_t w = LANES; w < width; w += LANES) {
            const Floats x = load(scores + w);
            most = x > most ? x : most;
        }
        float largest = most[0];
        for (int lane = 1; lane < LANES; lane++) largest = std::max(largest, most[lane]);
        Floats sum{};
        for (int64_t w = 0; w < width; w += LANES) {
            const Floats x = exp2((load(scores + w) - largest) * factor);
            sum += x;
            put_weights(x, weights + w);
        }
        sums[row] = 0;
        for (int lane = 0; lane < LANES; lane++) sums[row] += sum[lane];
    }
}

template <class E>
class Buffer {  // Begins with a cache line, grows, and forgets what was in it.
    static constexpr std::align_val_t LINE{64};
    E* data = nullptr;
    size_t room = 0;

public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::operator delete(data, LINE); }

    E* of(size_t elements) {
        if (elements > room) {
            ::operator delete(data, LINE);
            data = nullptr;
            data = static_cast<E*>(::operator new(elements * sizeof(E), LINE));
            room = elements;
        }
        return data;
    }
};

}  // namespace

// As `attention_cpu._Packed`. Strides are in elements; a head's dimensions lie beside each other.
struct Packed {
    const void *query, *key, *value;
    void* found;                                 // [tokens, heads, size]
    const int64_t *prompts, *candidates, *ends;  // `packing.PackedBatch`: [B, P], [B, K, S], [B, K]
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    int64_t heads, key_heads, size;
    int64_t remembered;  // Keys of a prompt from before, which stand first; 0: prompts are in the batch.
    int64_t rows, prompt_tokens, most_candidates, candidate_tokens;
    int64_t ends_only, threads;
    float scaling;
};

namespace {

template <class T>
class Attention {
    typedef typename Products<T>::Element E;

    struct Panel {  // Keys and values of a prompt or of a candidate, of one key head.
        int64_t length;
        E *keys, *values;

        static int64_t keys_room(int64_t length, int64_t size) { return up(length, LANES) * size; }
        static int64_t room(int64_t length, int64_t size) {
            return keys_room(length, size) + up(length, PAIR<E>) * size;
        }
        Panel(int64_t length, int64_t size, E* room)
            : length(length), keys(room), values(room + keys_room(length, size)) {}
    };

    struct Piece {  // Queries that are done together: of some tokens of a prompt, or of a candidate, for one key head.
        int64_t row, head;
        int64_t first;       // Place of the first token of that prompt or candidate.
        int64_t begin, end;  // Places of the tokens that ask.
        bool candidate;
    };

    struct Part {  // Keys that a piece's queries see: all of them, or those up to their own.
        const Panel& panel;
        bool causal;

        int64_t seen(int64_t position) const { return causal ? position + 1 : panel.length; }
    };

    struct Scratch {
        Buffer<E> own, query, weights;
        Buffer<float> scores;
    };

    const Packed& in;
    const int64_t size, shared;
    std::vector<int64_t> starts;  // Of rows' prompts among keys.
    std::vector<Panel> prompts;   // [rows, key heads]
    std::vector<Piece> pieces;
    Buffer<E> memory;

    void plan() {
        std::vector<int64_t> lengths;
        int64_t room = 0;
        for (int64_t row = 0; row < in.rows; row++) {
            const int64_t* places = in.prompts + row * in.prompt_tokens;
            int64_t length = in.remembered;
            if (!in.remembered)
                while (length < in.prompt_tokens && places[length] != ABSENT) length++;
            const int64_t start = in.remembered || !length ? 0 : places[0];
            starts.push_back(start);
            lengths.push_back(length);
            room += in.key_heads * Panel::room(length, size);
            for (int64_t head = 0; head < in.key_heads; head++) {
                if (!in.remembered && !in.ends_only)
                    for (int64_t begin = 0; begin < length; begin += BLOCK)
                        pieces.push_back(
                            {row, head, start, start + begin, start + std::min(length, begin + BLOCK), false});
                for (int64_t k = row * in.most_candidates; k < (row + 1) * in.most_candidates; k++) {
                    const int64_t last = in.ends[k];
                    if (last == ABSENT) continue;
                    const int64_t first = in.candidates[k * in.candidate_tokens];
                    pieces.push_back({row, head, first, in.ends_only ? last : first, last + 1, true});
                }
            }
        }
        E* next = memory.of(room);
        for (int64_t length : lengths)
            for (int64_t head = 0; head < in.key_heads; head++, next += Panel::room(length, size))
                prompts.emplace_back(length, size, next);
    }

    // The keys and values that begin at a place among all of them.
    void lay(const Panel& panel, int64_t place, int64_t head) const {
        lay_keys(static_cast<const T*>(in.key) + place * in.key_token + head * in.key_head, in.key_token, panel.length,
                 size, panel.keys);
        lay_values(static_cast<const T*>(in.value) + place * in.value_token + head * in.value_head, in.value_token,
                   panel.length, size, panel.values);
    }

    void attend(const Piece& piece, Scratch& scratch) const {
        const Panel& prompt = prompts[piece.row * in.key_heads + piece.head];
        if (!piece.candidate) return attend(piece, {{prompt, true}}, scratch);
        const int64_t length = piece.end - piece.first;
        const Panel own(length, size, scratch.own.of(Panel::room(length, size)));
        lay(own, in.remembered + piece.first, piece.head);
        attend(piece, {{prompt, false}, {own, true}}, scratch);
    }

    void attend(const Piece& piece, std::initializer_list<Part> parts, Scratch& scratch) const {
        const int64_t asked = (piece.end - piece.begin) * shared;
        E* query = scratch.query.of(ROWS * size);
        for (int64_t block = 0; block < asked; block += ROWS) {
            int64_t token[ROWS], head[ROWS];  // A block that is not full ends with its last query again.
            for (int row = 0; row < ROWS; row++) {
                const int64_t one = std::min(block + row, asked - 1);
                token[row] = piece.begin + one / shared;
                head[row] = piece.head * shared + one % shared;
                const T* from =
                    static_cast<const T*>(in.query) + token[row] * in.query_token + head[row] * in.query_head;
                for (int64_t d = 0; d < size; d++) convert(from[d], query[row * size + d]);
            }
            const int64_t latest = token[ROWS - 1] - piece.first;
            int64_t width = 0;
            for (const Part& part : parts) width += up(part.seen(latest), LANES);
            float* scores = scratch.scores.of(ROWS * std::max(width, size));
            int64_t column = 0;
            for (const Part& part : parts) {
                const int64_t wide = up(part.seen(latest), LANES);
                product(query, size, part.panel.keys, size, size, wide, scores + column, width, false);
                for (int row = 0; row < ROWS; row++) {
                    float* line = scores + row * width + column;
                    std::fill(line + part.seen(token[row] - piece.first), line + wide,
                              -std::numeric_limits<float>::infinity());
                }
                column += wide;
            }
            E* weights = scratch.weights.of(ROWS * width);
            float sums[ROWS];
            soften(scores, width, in.scaling, weights, sums);
            float* found = scores;  // Those have become weights.
            column = 0;
            for (const Part& part : parts) {
                const int64_t seen = part.seen(latest);
                product(weights + column, width, part.panel.values, up(part.panel.length, PAIR<E>), up(seen, PAIR<E>),
                        size, found, size, column > 0);
                column += up(seen, LANES);
            }
            for (int row = 0; row < ROWS; row++) {
                T* to = static_cast<T*>(in.found) + (token[row] * in.heads + head[row]) * size;
                for (int64_t d = 0; d < size; d++) from_float(found[row * size + d] / sums[row], to[d]);
            }
        }
    }

public:
    explicit Attention(const Packed& packed) : in(packed), size(in.size), shared(in.heads / in.key_heads) { plan(); }

    void run() {
#pragma omp parallel num_threads(int(in.threads))
        {
            Scratch scratch;
#pragma omp for schedule(dynamic)
            for (size_t one = 0; one < prompts.size(); one++)
                lay(prompts[one], starts[one / in.key_heads], int64_t(one) % in.key_heads);
#pragma omp for schedule(dynamic, 4)
            for (size_t one = 0; one < pieces.size(); one++) attend(pieces[one], scratch);
        }
    }
};

}  // namespace

// What cannot be allocated ends the process: an exception leaves neither a parallel region nor C.
extern "C" void attend_float32(const Packed* packed) { Attention<float>(*packed).run(); }
extern "C" void attend_bfloat16(const Packed* packed) { Attention<Bfloat16>(*packed).run(); }
