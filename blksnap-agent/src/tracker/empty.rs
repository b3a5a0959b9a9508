//! Empty program: what the hook itself costs. Measurements of the tracking programs are compared with it.

use aya::programs::BtfTracePoint;
use aya::{Btf, Ebpf, EbpfLoader};

use super::TrackerError;
use super::object::{OBJECT, program};
use super::refusal::one_line;

/// The name of the program in the object.
const NAME: &str = "bench_empty";
/// Where it is attached, as the program that sees writes begin.
const HOOK: &str = "block_bio_queue";

/// A program that does nothing, attached to the hook of the tracking programs until it is dropped.
#[derive(Debug)]
pub struct EmptyProgram {
    ebpf: Ebpf,
}

impl EmptyProgram {
    /// Loads and attaches it.
    ///
    /// # Errors
    /// No type information, no privilege.
    pub fn attach() -> Result<Self, TrackerError> {
        let failed = |error: &dyn std::error::Error| TrackerError::Load(one_line(error));
        let mut ebpf = EbpfLoader::new().load(OBJECT).map_err(|e| failed(&e))?;
        let btf = Btf::from_sys_fs().map_err(|e| failed(&e))?;
        let program: &mut BtfTracePoint = program(&mut ebpf, NAME)?;
        program.load(HOOK, &btf).map_err(|e| failed(&e))?;
        program.attach().map_err(|e| failed(&e))?;
        Ok(Self { ebpf })
    }

    /// The kernel's number of the program.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn id(&mut self) -> Result<u32, TrackerError> {
        let info = program(&mut self.ebpf, NAME)?
            .info()
            .map_err(|e| TrackerError::Load(one_line(&e)))?;
        Ok(info.id())
    }
}
