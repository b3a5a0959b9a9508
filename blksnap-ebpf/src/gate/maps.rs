//! Maps: all state of the gate's programs. Their layout is `blksnap_common::gate`.

use aya_ebpf::bindings::{BPF_F_INNER_MAP, BPF_F_MMAPABLE};
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use blksnap_common::gate::{
    GATED_DISKS, GateState, MAX_GATES, Parked, Parker, Passed, REQUEST_RING_BYTES, Request,
};
use blksnap_common::track::DiskSlots;

/// Units whose old data is kept: as many words as the range needs, set by the agent, mapped by it.
pub(crate) type Bitmap = Array<u64, 1, { (BPF_F_INNER_MAP | BPF_F_MMAPABLE) as usize }>;

/// The gates of each disk. A value is replaced as a whole.
#[btf_map]
pub(crate) static DISKS: HashMap<u32, DiskSlots, { GATED_DISKS as usize }> = HashMap::new();

/// The bitmap of each gate; set before the gate is in `DISKS`, and never replaced while it is there.
#[btf_map]
pub(crate) static KEPT: ArrayOfMaps<Bitmap, { MAX_GATES as usize }> = ArrayOfMaps::new();

/// State of each gate.
#[btf_map]
pub(crate) static STATE: Array<GateState, { MAX_GATES as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Armings of any gate so far, and one.
#[btf_map]
pub(crate) static EPOCH: Array<u64, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Writes that found everything kept, for each gate.
#[btf_map]
pub(crate) static PASSED: PerCpuArray<u64, { MAX_GATES as usize }> = PerCpuArray::new();

/// The last write that a copy of the program let pass on this CPU.
#[btf_map]
pub(crate) static LAST: PerCpuArray<Passed, 1> = PerCpuArray::new();

/// Writes that wait.
#[btf_map]
pub(crate) static REQUESTS: RingBuf<Request, { REQUEST_RING_BYTES as usize }> = RingBuf::new();

/// Writes that sleep: [`COPIES`](blksnap_common::gate::COPIES) for each CPU. The agent says how many CPUs there are.
#[btf_map]
pub(crate) static PARKED: Array<Parked, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Where they sleep.
#[btf_map]
pub(crate) static PARKER: Array<Parker, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// 1 when the first sleeping copy has seen anything: the kernel calls the function that it is attached to.
#[btf_map]
pub(crate) static HITS: Array<u64, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
