// Products on the tensor cores and what feeds them. Needs sm_80; include it after common.cuh (bf16, pack_bf16).
//
// One product is c (16 x 8, float32) += a (16 x DEPTH) b (DEPTH x 8); a warp holds the three in fragments, PTX ISA "mma.m16n8k16" and "k8".
// With g = lane / 4 and t = lane % 4 lane `lane` holds, for bf16 (two to a word, the lower k in the lower half; DEPTH 16)
//   a[0] (g, 2t..2t+1)  a[1] (g+8, 2t..)  a[2] (g, 2t+8..)  a[3] (g+8, 2t+8..)      b[0] (2t..2t+1, g)  b[1] (2t+8..2t+9, g)
// for tf32 (one to a word; DEPTH 8)
//   a[0] (g, t)         a[1] (g+8, t)     a[2] (g, t+4)     a[3] (g+8, t+4)         b[0] (t, g)         b[1] (t+4, g)
// and for both  c[0] c[1] (g, 2t..2t+1)   c[2] c[3] (g+8, 2t..2t+1).
// So the words of an 8 x 8 matrix of bf16, or of an 8 x 4 matrix of tf32, lie in the lanes alike: what `load_matrices` brings serves both.

template <class T> struct Mma;

template <> struct Mma<bf16> {
  static const int DEPTH = 16, PER_CHUNK = 8;  // elements in 16 bytes
  static __device__ __forceinline__ void product(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ unsigned operand(unsigned word) { return word; }
};

// Of float32 arrays: `operand` rounds a word to TF32 (10 bits of significand, ties away from zero). The product takes only what it has made.
template <> struct Mma<float> {
  static const int DEPTH = 8, PER_CHUNK = 4;
  static __device__ __forceinline__ void product(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ unsigned operand(unsigned word) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(word)));
    return rounded;
  }
};

// ---------------------------------------------------------------------------------------------------------------- shared memory

// A shared address as PTX has it. Sums in bytes.
__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Where chunk `chunk` (16 bytes) of row `row` lies in a tile whose rows have CHUNKS chunks, in chunks from the tile's start. Neither 8 rows'
// chunks of one number (ldmatrix) nor 8 neighbouring chunks (copies) meet in a bank. CHUNKS: 4, or a multiple of 8.
template <int CHUNKS> __device__ __forceinline__ int swizzled(int row, int chunk) {
  static_assert(CHUNKS == 4 || CHUNKS % 8 == 0, "rows of 64 or of 128 bytes, or multiples of 128");
  return row * CHUNKS + (chunk ^ (CHUNKS == 4 ? row >> 1 & 3 : row & 7));
}

// The same for a tile of words that are read one by one: those of rows t (4 of them) and columns g (8), row t and column g by lane 4g + t. A
// fragment of tf32 whose k goes along the rows of the tile is read so, as ldmatrix.trans turns halves of words. CHUNKS: a multiple of 8.
template <int CHUNKS> __device__ __forceinline__ int swizzled_words(int row, int column) {
  static_assert(CHUNKS % 8 == 0, "rows of multiples of 128 bytes");
  return 4 * (row * CHUNKS + (column / 4 ^ (row & 3) << 1)) + column % 4;
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + j gives the address of row j of matrix i, a multiple of 16; word i of lane l then holds
// row l / 4, elements 2 (l % 4) and the next, of matrix i. `turned`: of its transpose.
__device__ __forceinline__ void load_matrices(unsigned (&word)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_turned(unsigned (&word)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(address)
               : "memory");
}

// Begin to copy 16 bytes to shared memory, past the registers and the first cache. Where `there` is false they become zero, and nothing is
// read; `from` must then still be a multiple of 16 (the array's start will do).
__device__ __forceinline__ void copy16(unsigned to, const void* from, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// Close the group of this thread's copies since the last one; wait until all but the last LEFT groups have landed. A thread then sees what it
// copied itself, and after a barrier what others did.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
