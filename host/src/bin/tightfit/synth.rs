//! `tightfit synth`.

use std::time::Instant;

use tightfit::load::CancelToken;
use tightfit::synth::{self, Options, Preset};
use tightfit::types::Bytes;

use crate::args::SynthOptions;
use crate::failure::Failure;
use crate::{output, progress};

pub(crate) fn run(options: &SynthOptions, cancel: &CancelToken) -> Result<(), Failure> {
    let preset: Preset = options.preset.parse()?;
    let bar = progress::bytes("writing", options.quiet);
    let start = Instant::now();
    let written = synth::write(
        preset,
        &options.directory,
        &Options {
            headers_only: options.headers_only,
            seed: options.seed,
            ..Options::default()
        },
        &mut |written, total| {
            bar.set_length(total);
            bar.set_position(written);
        },
        cancel.flag(),
    );
    bar.finish_and_clear();
    let written = written?;
    if options.quiet {
        return Ok(());
    }
    output::print(&format!(
        "{}: {} tensors, {} in {} file{} ({:.1} s)\n",
        options.directory.display(),
        written.tensors,
        Bytes(written.bytes),
        written.shards,
        if written.shards == 1 { "" } else { "s" },
        start.elapsed().as_secs_f64(),
    ))
}
