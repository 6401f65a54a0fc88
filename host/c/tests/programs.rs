//! C programs, compiled by the system's compiler against the header and the libraries that cargo
//! builds with this test, and run under AddressSanitizer where there is one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;
use tightfit::load::LoadOptions;
use tightfit_tests::golden::GoldenModel;
use tightfit_tests::loading::{DOUBLE_QUANT, Planned, tensor};

const TENSOR: &str = "model.layers.0.mlp.up_proj.weight";
const DEVICE: &str = "sim:1GiB";

/// Where cargo puts the libraries: beside this test.
fn libraries() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().to_owned()
}

/// Compiles a program; with AddressSanitizer it is linked statically, otherwise with the shared
/// library.
fn compile(source: &str, program: &Path, sanitize: bool) -> Output {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let libraries = libraries();
    let mut compiler = Command::new("cc");
    compiler
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-g", "-o"])
        .arg(program)
        .arg(root.join(source))
        .arg("-I")
        .arg(root.join("include"));
    if sanitize {
        compiler
            .args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
            .arg(libraries.join("libtightfit_c.a"))
            .args(["-lpthread", "-ldl", "-lm"]);
    } else {
        compiler
            .arg("-L")
            .arg(&libraries)
            .args(["-ltightfit_c", "-lm"])
            .arg(format!("-Wl,-rpath,{}", libraries.display()));
    }
    compiler.output().unwrap()
}

/// The ways in which programs can be built here: with and without AddressSanitizer. Without a C
/// compiler there are none, which `TIGHTFIT_REQUIRE_C=1` makes a failure.
fn ways(directory: &Path) -> Vec<bool> {
    if !cfg!(target_os = "linux") || Command::new("cc").arg("--version").output().is_err() {
        assert!(
            std::env::var_os("TIGHTFIT_REQUIRE_C").is_none_or(|value| value != "1"),
            "there is no C compiler `cc`, and TIGHTFIT_REQUIRE_C=1"
        );
        eprintln!("not run: the C programs need Linux and a C compiler `cc`");
        return Vec::new();
    }
    let empty = directory.join("empty.c");
    std::fs::write(&empty, "int main(void) { return 0; }\n").unwrap();
    let sanitizer = Command::new("cc")
        .args(["-fsanitize=address,undefined", "-o"])
        .arg(directory.join("empty"))
        .arg(&empty)
        .output()
        .unwrap();
    if !sanitizer.status.success() {
        eprintln!("without AddressSanitizer, which `cc` does not have");
        return vec![false];
    }
    vec![false, true]
}

/// Compiles a program in every way and gives what each run printed.
fn run(source: &str, arguments: &[&str], status: i32) -> Vec<(String, String)> {
    let directory = TempDir::new().unwrap();
    let program = directory.path().join("program");
    let ways = ways(directory.path());
    let run = |sanitize| {
        let compiled = compile(source, &program, sanitize);
        assert!(
            compiled.status.success(),
            "{source}: {}",
            String::from_utf8_lossy(&compiled.stderr)
        );
        let output = Command::new(&program)
            .args(arguments)
            .env("ASAN_OPTIONS", "detect_leaks=1")
            // Cargo's value leads to what an earlier `cargo build` left one directory up.
            .env("LD_LIBRARY_PATH", libraries())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let (out, err) = (text(output.stdout), text(output.stderr));
        assert_eq!(output.status.code(), Some(status), "{source}: {out}{err}");
        (out, err)
    };
    ways.into_iter().map(run).collect()
}

#[test]
fn the_example_prints_what_the_library_says() {
    let golden = GoldenModel::unpack("llama");
    let path = golden.path("bf16");
    let planned = Planned::new(&path, &[DEVICE], DOUBLE_QUANT);
    let model = planned.load(&LoadOptions::default());
    let device = &model.plan().devices[0];
    let up_proj = tensor(&model, TENSOR);
    let values: Vec<f32> = up_proj.to_floats().unwrap();
    let sum: f64 = values.iter().map(|&value| f64::from(value)).sum();
    let mut expected = vec![
        format!("planned for sim:0: {} bytes", device.size.reserved),
        format!(
            "loaded {} bytes, {} tensors",
            model.stats().bytes_read,
            model.tensors().count()
        ),
        format!(
            "sim:0 allocated {} padded {} reserved {} peak {} headroom {} tensors {}",
            device.size.requested,
            device.size.padded,
            device.size.reserved,
            device.size.reserved,
            device.headroom,
            device.tensors
        ),
        format!("{TENSOR} BF16 nf4+double sim:0"),
    ];
    for (kind, part) in (1..).zip(up_proj.parts()) {
        expected.push(format!(
            "part {kind} at {}, {} bytes",
            part.offset, part.bytes
        ));
    }

    let path = path.to_str().unwrap();
    for (printed, _) in run("examples/load.c", &[path, "auto", TENSOR, DEVICE], 0) {
        let (json, lines): (Vec<&str>, Vec<&str>) =
            printed.lines().partition(|line| line.starts_with('{'));
        let (last, lines) = lines.split_last().unwrap();
        assert_eq!(lines, expected);
        let (elements, printed_sum) = last.split_once(" elements, sum ").unwrap();
        assert_eq!(elements, values.len().to_string());
        assert_eq!(printed_sum.parse::<f64>().unwrap(), sum);
        let report: serde_json::Value = serde_json::from_str(json[0]).unwrap();
        assert_eq!(report["schema"], 1);
        assert_eq!(report["devices"][0]["peak_reserved"], device.size.reserved);
        assert_eq!(report["load"]["bytes_read"], model.stats().bytes_read);
    }
}

#[test]
fn the_first_load_takes_what_was_planned() {
    let golden = GoldenModel::unpack("llama");
    let path = golden.path("bf16");
    let path = path.to_str().unwrap();
    let planned = Planned::new(Path::new(path), &[DEVICE], DOUBLE_QUANT);
    let bytes = planned.plan.devices[0].size.reserved;
    for (printed, _) in run("examples/first_load.c", &[path, DEVICE], 0) {
        let expected =
            format!("planned {bytes} bytes\nat most {bytes} bytes\n{TENSOR} in nf4+double");
        assert!(printed.starts_with(&expected), "{printed}");
    }
    for (printed, said) in run("examples/first_load.c", &[path, "sim:1KiB"], 4) {
        assert_eq!(printed, "");
        assert!(said.contains("are missing"), "{said}");
    }
}

#[test]
fn the_example_ends_with_the_class_of_the_error_and_says_what_it_is() {
    for (_, printed) in run("examples/load.c", &["/nowhere", "auto", TENSOR, DEVICE], 3) {
        assert!(printed.contains("/nowhere"), "{printed}");
    }
}

#[test]
fn misuse_is_an_error_and_nothing_leaks() {
    let golden = GoldenModel::unpack("llama");
    let path = golden.path("bf16");
    for (printed, _) in run("tests/programs/misuse.c", &[path.to_str().unwrap()], 0) {
        assert_eq!(printed, "as it must be\n");
    }
}

#[test]
fn what_is_shared_outlives_the_model_and_nothing_leaks() {
    let golden = GoldenModel::unpack("llama");
    let path = golden.path("bf16");
    let arguments = [path.to_str().unwrap(), TENSOR];
    for (printed, _) in run("tests/programs/share.c", &arguments, 0) {
        assert_eq!(printed, "as it must be\n");
    }
}

#[test]
fn products_are_those_of_the_dequantized_weight_and_nothing_leaks() {
    let golden = GoldenModel::unpack("llama");
    let path = golden.path("bf16");
    let arguments = [path.to_str().unwrap(), TENSOR, DEVICE];
    for (printed, _) in run("tests/programs/linear.c", &arguments, 0) {
        assert_eq!(printed, "as it must be\n");
    }
}

#[test]
fn experts_are_those_of_single_products_and_nothing_leaks() {
    let golden = GoldenModel::unpack("qwen3_moe");
    let path = golden.path("bf16");
    let module = "model.layers.1.mlp.experts";
    let arguments = [path.to_str().unwrap(), module, DEVICE];
    for (printed, _) in run("tests/programs/experts.c", &arguments, 0) {
        assert_eq!(printed, "as it must be\n");
    }
}

/// The script says what is not installed; `TIGHTFIT_REQUIRE_TORCH=1` and `TIGHTFIT_REQUIRE_NUMPY=1`
/// make that a failure. `TIGHTFIT_PYTHON` is the interpreter to use.
#[test]
fn python_takes_tensors_without_a_copy() {
    let python = std::env::var("TIGHTFIT_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let required = |package| std::env::var_os(package).is_some_and(|value| value == "1");
    if !cfg!(target_os = "linux") || Command::new(&python).arg("--version").output().is_err() {
        assert!(
            !required("TIGHTFIT_REQUIRE_TORCH") && !required("TIGHTFIT_REQUIRE_NUMPY"),
            "there is no {python}"
        );
        eprintln!("not run: there is no {python}");
        return;
    }
    let golden = GoldenModel::unpack("llama");
    let output = Command::new(&python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/dlpack_torch.py"))
        .arg(libraries().join("libtightfit_c.so"))
        .arg(golden.path("bf16"))
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    eprint!("{out}");
    assert!(out.lines().count() >= 2, "{out}");
}
