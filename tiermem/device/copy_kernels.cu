// Copies of many pieces by kernels: between mapped host memory and device memory, and within the
// latter. Compiled at run time by NVRTC for the GPU that is there (from sm_75 on).
//
// The table of pieces is the kernel's parameter; its layout is KernelTable's in copy_driver.h.
// Measured on an H200 (PCIe gen 5 x16, 55.5 GB/s by DMA), pieces of 16 KiB, GB/s to the device
// and from it: 50.9 and 52.0 with copy_aligned on 4 blocks, 50.8 and 52.3 with copy_any on 64. What
// is missing is the link's: a multiprocessor asks for 128 bytes at a time, DMA for more.

typedef unsigned long long u64;

struct Piece {
  u64 dst_and_low, src_and_high;

  static constexpr u64 kAddress = (1ull << 56) - 1;

  __device__ u64 dst() const { return dst_and_low & kAddress; }
  __device__ u64 src() const { return src_and_high & kAddress; }
  __device__ unsigned bytes() const {
    return static_cast<unsigned>(dst_and_low >> 56 | src_and_high >> 56 << 8);
  }
};

struct Table {
  u64 count;
  Piece pieces[2040];
};

// ---- any addresses and sizes: a block takes a piece, a thread 4 words of 16 bytes at a time -----

__device__ void copy_words(uint4* dst, const uint4* src, unsigned count) {
  constexpr unsigned kInFlight = 4;
  unsigned i = threadIdx.x;
  for (; i + (kInFlight - 1) * blockDim.x < count; i += kInFlight * blockDim.x) {
    uint4 words[kInFlight];
#pragma unroll
    for (unsigned k = 0; k < kInFlight; ++k) words[k] = src[i + k * blockDim.x];
#pragma unroll
    for (unsigned k = 0; k < kInFlight; ++k) dst[i + k * blockDim.x] = words[k];
  }
  for (; i < count; i += blockDim.x) dst[i] = src[i];
}

__device__ void copy_bytes(unsigned char* dst, const unsigned char* src, unsigned count) {
  for (unsigned i = threadIdx.x; i < count; i += blockDim.x) dst[i] = src[i];
}

extern "C" __global__ void __launch_bounds__(1024) copy_any(const __grid_constant__ Table table) {
  for (unsigned p = blockIdx.x; p < table.count; p += gridDim.x) {
    const u64 dst = table.pieces[p].dst(), src = table.pieces[p].src();
    const unsigned bytes = table.pieces[p].bytes();
    const unsigned words = (dst | src) % 16 == 0 ? bytes / 16 : 0;
    copy_words(reinterpret_cast<uint4*>(dst), reinterpret_cast<const uint4*>(src), words);
    copy_bytes(reinterpret_cast<unsigned char*>(dst) + 16 * words,
               reinterpret_cast<const unsigned char*>(src) + 16 * words, bytes - 16 * words);
  }
}

#if __CUDA_ARCH__ >= 900

// ---- multiples of 16, sm_90: one thread a block drives bulk copies through shared memory --------
//
// kStages tiles of shared memory; kAhead of them are being read while the others are written out.
// So 4 multiprocessors of 132 keep the link busy, and no registers are held.

constexpr unsigned kTile = 8192;
constexpr unsigned kStages = 16;
constexpr unsigned kAhead = 8;

__device__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// The tiles of every gridDim.x-th piece, one after the other.
struct Tiles {
  const Table& table;
  unsigned piece;
  unsigned offset = 0;

  __device__ bool at_end() const { return piece >= table.count; }
  __device__ u64 dst() const { return table.pieces[piece].dst() + offset; }
  __device__ u64 src() const { return table.pieces[piece].src() + offset; }
  __device__ unsigned bytes() const {
    const unsigned left = table.pieces[piece].bytes() - offset;
    return left < kTile ? left : kTile;
  }
  __device__ void next() {
    offset += kTile;
    if (offset < table.pieces[piece].bytes()) return;
    offset = 0;
    piece += gridDim.x;
  }
};

__device__ void start_barrier(unsigned barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ void load(unsigned buffer, u64 src, unsigned bytes, unsigned barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(buffer), "l"(src), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ void wait_for(unsigned barrier, unsigned parity) {
  unsigned is_done = 0;
  while (!is_done) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(is_done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

__device__ void store(u64 dst, unsigned buffer, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst),
               "r"(buffer), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

extern "C" __global__ void copy_aligned(const __grid_constant__ Table table) {
  extern __shared__ __align__(128) unsigned char buffers[];
  __shared__ __align__(8) u64 barriers[kStages];
  if (threadIdx.x != 0) return;
  for (unsigned s = 0; s < kStages; ++s) start_barrier(shared_address(&barriers[s]));
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");

  Tiles loads{table, blockIdx.x}, stores{table, blockIdx.x};
  const auto load_next = [&](unsigned k) {
    if (loads.at_end()) return;
    load(shared_address(buffers) + k % kStages * kTile, loads.src(), loads.bytes(),
         shared_address(&barriers[k % kStages]));
    loads.next();
  };
  for (unsigned k = 0; k < kAhead; ++k) load_next(k);
  for (unsigned k = 0; !stores.at_end(); ++k, stores.next()) {
    wait_for(shared_address(&barriers[k % kStages]), k / kStages % 2);
    store(stores.dst(), shared_address(buffers) + k % kStages * kTile, stores.bytes());
    // The next load takes the stage whose store was given kStages - kAhead stores ago: all but the
    // newest of those must have been read out.
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kStages - kAhead) : "memory");
    load_next(k + kAhead);
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#endif
