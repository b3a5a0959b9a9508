//! Builds the eBPF object that the agent embeds.
fn main() -> anyhow::Result<()> {
    // SAFETY: build scripts are single threaded here.
    unsafe {
        std::env::set_var("RUSTC_BOOTSTRAP", "1");
        std::env::set_var("__CARGO_TESTS_ONLY_SRC_ROOT", "/root/.cache/blksnap/library");
    }
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "blksnap-ebpf",
            root_dir: "../blksnap-ebpf",
            ..Default::default()
        }],
        aya_build::Toolchain::Custom("stable"),
    )
}
