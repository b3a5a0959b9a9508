//! Calls: the numbers of kernel functions, put into the programs before they are loaded.
//!
//! A program calls a function of the kernel by its number in the kernel's type information, with
//! `BPF_PSEUDO_KFUNC_CALL` in the instruction (include/uapi/linux/bpf.h). aya knows of no such calls. So the programs have
//! calls of helpers that do not exist, by numbers of ours, which are found and replaced here.

use blksnap_common::gate::{TASK_FROM_PID, TASK_RELEASE};

use crate::tracker::{BtfError, KernelBtf};

/// `BPF_JMP | BPF_CALL`.
const CALL: u8 = 0x85;

/// `BPF_PSEUDO_KFUNC_CALL`, in the half of the second byte that names the source register.
const KERNEL_FUNCTION: u8 = 2 << 4;

/// Bytes of an instruction; sections of programs are aligned so.
const INSTRUCTION: usize = 8;

/// The functions, and what stands for them.
const FUNCTIONS: [(u32, &str); 2] = [
    (TASK_FROM_PID, "bpf_task_from_pid"),
    (TASK_RELEASE, "bpf_task_release"),
];

/// Puts the numbers of this kernel's functions into the object.
///
/// # Errors
/// The kernel has no such function: it is older than 6.2.
pub(in crate::filter::gate) fn put(object: &mut [u8], btf: &KernelBtf) -> Result<(), BtfError> {
    for (mark, name) in FUNCTIONS {
        replace(object, mark, btf.function(name)?);
    }
    Ok(())
}

/// Replaces all calls of `mark`, and says how many there were.
fn replace(object: &mut [u8], mark: u32, function: u32) -> usize {
    let mut pattern = [CALL, 0, 0, 0, 0, 0, 0, 0];
    pattern[4..].copy_from_slice(&mark.to_le_bytes());
    let mut found = 0;
    for instruction in object.chunks_exact_mut(INSTRUCTION) {
        if *instruction == pattern {
            instruction[1] = KERNEL_FUNCTION;
            instruction[4..].copy_from_slice(&function.to_le_bytes());
            found += 1;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::gate::object::OBJECT;

    /// What is compiled has each call where this looks for it.
    #[test]
    fn the_object_has_a_call_of_each() {
        for (mark, name) in FUNCTIONS {
            let mut object = OBJECT.to_vec();
            assert!(replace(&mut object, mark, 12345) > 0, "no call of {name}");
            assert_eq!(object.len(), OBJECT.len());
            let changed = object.iter().zip(OBJECT).filter(|(a, b)| a != b).count();
            assert!(
                changed <= 5 * replace(&mut OBJECT.to_vec(), mark, 1),
                "{changed} bytes of {name}"
            );
            assert_eq!(replace(&mut object, mark, 1), 0);
        }
    }

    #[test]
    fn only_calls_are_replaced() {
        let mark = TASK_RELEASE.to_le_bytes();
        let load = [0x18, 1, 0, 0, mark[0], mark[1], mark[2], mark[3]];
        let call = [CALL, 0, 0, 0, mark[0], mark[1], mark[2], mark[3]];
        let mut object = [load, call, load].concat();
        assert_eq!(replace(&mut object, TASK_RELEASE, 0x0102_0304), 1);
        assert_eq!(object[..8], load);
        assert_eq!(object[8..16], [CALL, 0x20, 0, 0, 4, 3, 2, 1]);
        assert_eq!(object[16..], load);
    }
}
