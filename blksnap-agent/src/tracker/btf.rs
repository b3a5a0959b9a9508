//! BTF: the few facts about kernel structs that the programs need, read from the kernel's own type information.
//!
//! aya keeps struct members to itself, and programs compiled from Rust carry no relocations; so this reads the
//! raw section (`include/uapi/linux/btf.h`) once, keeps an index of where each type starts, and answers three
//! questions: the offset of a member, the value of an enumerator, the position of a parameter.

use std::ops::Range;
use std::path::Path;

/// Kinds of `enum btf_kind` (`BTF_KIND_*`) that are looked into.
mod kind {
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const INT: u32 = 1;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// `BTF_MAGIC`.
const MAGIC: u16 = 0xeb9f;
/// Size of `struct btf_header`.
const HEADER: usize = 24;
/// Size of the fixed part of a type (`struct btf_type`).
const TYPE: usize = 12;

/// What is wrong with the kernel's type information.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The file can't be read.
    #[error("can't read {path}: {source}; the kernel must be built with CONFIG_DEBUG_INFO_BTF")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The bytes are no BTF of this byte order.
    #[error(
        "the kernel's type information is damaged at byte {0}; boot a kernel built with CONFIG_DEBUG_INFO_BTF by its own tools"
    )]
    Damaged(usize),
    /// A type, member, enumerator or parameter is not there.
    #[error("the kernel's type information has no {0}; kernels 6.1 to 7.x are known to work")]
    Missing(String),
}

/// The kernel's type information.
pub struct KernelBtf {
    data: Vec<u8>,
    /// Start of each type in `data`; types count from 1, 0 is void.
    types: Vec<usize>,
    strings: usize,
    strings_end: usize,
}

impl KernelBtf {
    /// Where the kernel shows its type information.
    pub const PATH: &str = "/sys/kernel/btf/vmlinux";

    /// Reads the type information at `path`.
    ///
    /// # Errors
    /// The file can't be read, or is damaged.
    pub fn read(path: &Path) -> Result<Self, BtfError> {
        let data = std::fs::read(path).map_err(|source| BtfError::Read {
            path: path.display().to_string(),
            source,
        })?;
        Self::parse(data)
    }

    /// Parses a raw BTF section of this machine's byte order.
    ///
    /// # Errors
    /// It is damaged: wrong magic, a length past the end, an unknown kind.
    pub fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        let sections = Sections::of(&data)?;
        let mut types = vec![0];
        index_types(&data, sections.types, &mut types)?;
        Ok(Self {
            types,
            strings: sections.strings.start,
            strings_end: sections.strings.end,
            data,
        })
    }

    /// The type information of a module beside the kernel's; `None` if no module of this name is loaded, or the
    /// kernel does not show its types.
    #[must_use]
    pub fn with_module(&self, name: &str) -> Option<Self> {
        let path = Path::new(Self::PATH).with_file_name(name);
        self.extended(&std::fs::read(path).ok()?).ok()
    }

    /// A module's types and strings count on from the kernel's.
    fn extended(&self, module: &[u8]) -> Result<Self, BtfError> {
        let sections = Sections::of(module)?;
        // Strings have to be in one piece.
        let mut data = self.data[..self.strings_end].to_vec();
        if self.types.iter().any(|at| *at >= data.len()) {
            return Err(BtfError::Damaged(self.strings_end));
        }
        data.extend_from_slice(&module[sections.strings]);
        let strings_end = data.len();
        data.extend_from_slice(&module[sections.types]);
        let mut types = self.types.clone();
        index_types(&data, strings_end..data.len(), &mut types)?;
        Ok(Self {
            types,
            strings: self.strings,
            strings_end,
            data,
        })
    }

    /// Size of struct `name` in bytes.
    ///
    /// # Errors
    /// There is no such struct.
    pub fn struct_size(&self, name: &str) -> Result<u32, BtfError> {
        let id = self
            .find(name, kind::STRUCT)
            .ok_or_else(|| BtfError::Missing(format!("struct {name}")))?;
        word(&self.data, self.at(id)? + 8)
    }

    /// Number of the function `name`, by which programs call it.
    ///
    /// # Errors
    /// There is no such function.
    pub fn function(&self, name: &str) -> Result<u32, BtfError> {
        self.find(name, kind::FUNC)
            .ok_or_else(|| BtfError::Missing(format!("function {name}")))
    }

    /// Offset in bytes of a member of struct `name`; `path` names members of members in turn, and members of
    /// anonymous structs and unions count as the struct's own.
    ///
    /// # Errors
    /// There is no such struct or member, or it is a bit field.
    pub fn member_offset(&self, name: &str, path: &[&str]) -> Result<u32, BtfError> {
        let missing = || BtfError::Missing(format!("member {} of struct {name}", path.join(".")));
        let mut id = self.find(name, kind::STRUCT).ok_or_else(missing)?;
        let mut bits = 0;
        for member in path {
            let (offset, of) = self.member(id, member)?.ok_or_else(missing)?;
            bits += offset;
            id = self.strip(of)?;
        }
        if bits % 8 == 0 {
            Ok(bits / 8)
        } else {
            Err(missing())
        }
    }

    /// Value of an enumerator of any enum of 32 bits.
    ///
    /// # Errors
    /// No enum has it.
    pub fn enumerator(&self, name: &str) -> Result<u32, BtfError> {
        for &at in self.types.iter().skip(1) {
            if self.kind(at)? != kind::ENUM {
                continue;
            }
            for i in 0..self.vlen(at)? {
                let entry = at + TYPE + i * 8;
                if self.is_named(entry, name)? {
                    return word(&self.data, entry + 4);
                }
            }
        }
        Err(BtfError::Missing(format!("enumerator {name}")))
    }

    /// Position of the first parameter of type `struct NAME *` of a BTF tracepoint, from 0 on, not counting the
    /// private pointer that comes first in the kernel's prototype.
    ///
    /// # Errors
    /// There is no such tracepoint or parameter.
    pub fn tracepoint_parameter(&self, tracepoint: &str, name: &str) -> Result<u32, BtfError> {
        let missing = || BtfError::Missing(format!("parameter struct {name} * of tracepoint {tracepoint}"));
        let typedef = self
            .find(&format!("btf_trace_{tracepoint}"), kind::TYPEDEF)
            .ok_or_else(missing)?;
        let pointer = self.strip(typedef)?;
        let proto = self.strip(self.reference(pointer)?)?;
        let at = self.at(proto)?;
        if self.kind(at)? != kind::FUNC_PROTO {
            return Err(missing());
        }
        for i in 1..self.vlen(at)? {
            let parameter = self.strip(word(&self.data, at + TYPE + i * 8 + 4)?)?;
            if parameter == 0 || self.kind(self.at(parameter)?)? != kind::PTR {
                continue;
            }
            let target = self.strip(self.reference(parameter)?)?;
            if target != 0 && self.is_named(self.at(target)?, name)? {
                return u32::try_from(i - 1).map_err(|_| missing());
            }
        }
        Err(missing())
    }

    /// A member of the struct or union `id`: its offset in bits and its type.
    fn member(&self, id: u32, name: &str) -> Result<Option<(u32, u32)>, BtfError> {
        let at = self.at(id)?;
        if !matches!(self.kind(at)?, kind::STRUCT | kind::UNION) {
            return Ok(None);
        }
        let bit_fields = word(&self.data, at + 4)? >> 31 == 1;
        for i in 0..self.vlen(at)? {
            let entry = at + TYPE + i * 12;
            let of = word(&self.data, entry + 4)?;
            let raw = word(&self.data, entry + 8)?;
            let offset = if bit_fields { raw & 0xff_ffff } else { raw };
            if self.is_named(entry, name)? {
                return Ok(Some((offset, of)));
            }
            if word(&self.data, entry)? == 0
                && let Some((inner, of)) = self.member(self.strip(of)?, name)?
            {
                return Ok(Some((offset + inner, of)));
            }
        }
        Ok(None)
    }

    /// The type behind typedefs and qualifiers.
    fn strip(&self, mut id: u32) -> Result<u32, BtfError> {
        for _ in 0..64 {
            if id == 0 {
                return Ok(0);
            }
            let at = self.at(id)?;
            match self.kind(at)? {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = word(&self.data, at + 8)?;
                }
                _ => return Ok(id),
            }
        }
        Err(BtfError::Damaged(self.at(id)?))
    }

    /// The type that the pointer `id` points to.
    fn reference(&self, id: u32) -> Result<u32, BtfError> {
        word(&self.data, self.at(id)? + 8)
    }

    fn find(&self, name: &str, wanted: u32) -> Option<u32> {
        let found = self.types.iter().skip(1).position(|&at| {
            self.kind(at).is_ok_and(|kind| kind == wanted) && self.is_named(at, name).unwrap_or(false)
        })?;
        u32::try_from(found + 1).ok()
    }

    fn at(&self, id: u32) -> Result<usize, BtfError> {
        match self.types.get(id as usize) {
            Some(&at) if id != 0 => Ok(at),
            _ => Err(BtfError::Damaged(0)),
        }
    }

    fn kind(&self, at: usize) -> Result<u32, BtfError> {
        Ok(word(&self.data, at + 4)? >> 24 & 0x1f)
    }

    fn vlen(&self, at: usize) -> Result<usize, BtfError> {
        Ok((word(&self.data, at + 4)? & 0xffff) as usize)
    }

    /// Whether the entry at `at`, which starts with the offset of its name, is called `name`.
    fn is_named(&self, at: usize, name: &str) -> Result<bool, BtfError> {
        let start = self.strings + word(&self.data, at)? as usize;
        Ok(self
            .data
            .get(start..)
            .is_some_and(|rest| rest.starts_with(name.as_bytes()) && rest.get(name.len()) == Some(&0)))
    }
}

/// Where types and strings are in a raw section.
struct Sections {
    types: Range<usize>,
    strings: Range<usize>,
}

impl Sections {
    fn of(data: &[u8]) -> Result<Self, BtfError> {
        let magic = data.get(..2).map(|b| u16::from_ne_bytes([b[0], b[1]]));
        if magic != Some(MAGIC) {
            return Err(BtfError::Damaged(0));
        }
        let header = word(data, 4)? as usize;
        let start = header.max(HEADER) + word(data, 8)? as usize;
        let end = start + word(data, 12)? as usize;
        let strings = header + word(data, 16)? as usize;
        let strings_end = strings + word(data, 20)? as usize;
        if end > data.len() || strings_end > data.len() || strings_end <= strings {
            return Err(BtfError::Damaged(8));
        }
        if data[strings_end - 1] != 0 {
            return Err(BtfError::Damaged(strings_end - 1));
        }
        Ok(Self {
            types: start..end,
            strings: strings..strings_end,
        })
    }
}

/// Adds the start of every type of `section` to `index`.
fn index_types(data: &[u8], section: Range<usize>, index: &mut Vec<usize>) -> Result<(), BtfError> {
    let mut at = section.start;
    while at < section.end {
        index.push(at);
        at += TYPE + tail(data, at)?;
    }
    if at == section.end {
        Ok(())
    } else {
        Err(BtfError::Damaged(at))
    }
}

/// The 32-bit word at `at`.
fn word(data: &[u8], at: usize) -> Result<u32, BtfError> {
    let bytes = data.get(at..at + 4).ok_or(BtfError::Damaged(at))?;
    Ok(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// Length of what follows the fixed part of the type at `at`.
fn tail(data: &[u8], at: usize) -> Result<usize, BtfError> {
    let info = word(data, at + 4)?;
    let vlen = (info & 0xffff) as usize;
    Ok(match info >> 24 & 0x1f {
        kind::INT | kind::VAR | kind::DECL_TAG => 4,
        kind::ARRAY => 12,
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * vlen,
        kind::ENUM | kind::FUNC_PROTO => 8 * vlen,
        // Pointers, forward declarations, typedefs, qualifiers, functions, floats, type tags.
        2 | 7..=12 | 16 | 18 => 0,
        _ => return Err(BtfError::Damaged(at)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> KernelBtf {
        KernelBtf::read(Path::new(KernelBtf::PATH)).unwrap()
    }

    #[test]
    fn finds_what_the_programs_need() {
        let btf = kernel();
        assert_eq!(btf.member_offset("bio", &["bi_bdev"]).unwrap(), 8);
        assert_eq!(btf.member_offset("bio", &["bi_opf"]).unwrap(), 16);
        let iter = btf.member_offset("bio", &["bi_iter"]).unwrap();
        assert_eq!(btf.member_offset("bio", &["bi_iter", "bi_sector"]).unwrap(), iter);
        assert_eq!(
            btf.member_offset("bio", &["bi_iter", "bi_size"]).unwrap(),
            iter + 8
        );
        assert_eq!(btf.tracepoint_parameter("block_bio_queue", "bio").unwrap(), 0);
        assert!(btf.enumerator("BIO_TRACE_COMPLETION").unwrap() < 16);
        assert!(btf.function("submit_bio_noacct").unwrap() > 0);
        assert!(btf.function("no_such_function").is_err());
    }

    #[test]
    fn looks_into_anonymous_members() {
        // `struct page` keeps `lru` in an anonymous struct of an anonymous union.
        assert!(kernel().member_offset("page", &["lru"]).unwrap() > 0);
    }

    /// A module's section with one struct: members at byte 8 and 16, the second named by the module's own string.
    fn module(kernel: &KernelBtf) -> Vec<u8> {
        let base = u32::try_from(kernel.strings_end - kernel.strings).unwrap();
        let own = b"scsi_made_up\0cdb_made_up\0";
        let known = kernel.data[kernel.strings..kernel.strings_end]
            .windows(9)
            .position(|name| name == b"\0bi_bdev\0")
            .unwrap();
        let words = [
            base,
            kind::STRUCT << 24 | 2,
            48,
            u32::try_from(known + 1).unwrap(),
            1,
            64,
            base + 13,
            1,
            128,
        ];
        let types: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut data = Vec::new();
        data.extend_from_slice(&MAGIC.to_ne_bytes());
        data.extend_from_slice(&[1, 0]);
        let types_length = u32::try_from(types.len()).unwrap();
        for word in [
            24,
            0,
            types_length,
            types_length,
            u32::try_from(own.len()).unwrap(),
        ] {
            data.extend_from_slice(&word.to_ne_bytes());
        }
        data.extend_from_slice(&types);
        data.extend_from_slice(own);
        data
    }

    #[test]
    fn a_module_counts_on_from_the_kernel() {
        let section = module(&kernel());
        let btf = kernel().extended(&section).unwrap();
        assert_eq!(btf.struct_size("scsi_made_up").unwrap(), 48);
        assert_eq!(btf.member_offset("scsi_made_up", &["bi_bdev"]).unwrap(), 8);
        assert_eq!(btf.member_offset("scsi_made_up", &["cdb_made_up"]).unwrap(), 16);
        // The kernel's own are where they were.
        assert_eq!(btf.member_offset("bio", &["bi_bdev"]).unwrap(), 8);
        assert_eq!(
            btf.struct_size("request").unwrap(),
            kernel().struct_size("request").unwrap()
        );
        for cut in [0, 3, 24, section.len() - 1] {
            assert!(kernel().extended(&section[..cut]).is_err(), "cut at {cut}");
        }
        assert!(kernel().with_module("no_such_module").is_none());
    }

    #[test]
    fn names_what_is_missing() {
        let btf = kernel();
        let error = btf.member_offset("bio", &["bi_nothing"]).unwrap_err().to_string();
        assert!(error.contains("member bi_nothing of struct bio"), "{error}");
        assert!(btf.enumerator("NO_SUCH_ENUMERATOR").is_err());
        assert!(
            btf.tracepoint_parameter("block_bio_queue", "request_queue")
                .is_err()
        );
        assert!(KernelBtf::read(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn damage_is_an_error_at_every_cut() {
        let data = std::fs::read(KernelBtf::PATH).unwrap();
        for cut in [0, 1, 2, 10, 23, 24, 100, data.len() / 2, data.len() - 1] {
            assert!(KernelBtf::parse(data[..cut].to_vec()).is_err(), "cut at {cut}");
        }
    }
}
