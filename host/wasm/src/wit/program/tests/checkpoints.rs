use super::*;
use wit_checkpoints::Host as _;

#[test]
fn only_what_was_granted_opens_and_only_by_its_name() {
    let (directory, other) = (checkpoint(), checkpoint());
    let mut program = with_model(directory.path(), MIB);
    assert_eq!(program.call().get_names().unwrap(), ["model"]);
    program.open("model");
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    for name in [
        String::new(),
        "other".to_owned(),
        "../model".to_owned(),
        "./model".to_owned(),
        "model/".to_owned(),
        "model/model.safetensors".to_owned(),
        "MODEL".to_owned(),
        "model\0".to_owned(),
        path(directory.path()),
        path(other.path()),
        "x".repeat(1 << 20),
    ] {
        let errors::Error::NotFound(message) = told(program.call().open(name.clone())) else {
            panic!("it is something else");
        };
        assert!(message.len() < 5000);
    }
}

#[test]
fn what_is_wrong_with_a_checkpoint_is_told_without_where_it_is() {
    let directory = TempDir::new().unwrap();
    let secret = directory.path().join("secret");
    let mut program = with_model(&secret, MIB);
    let told_so = |program: &mut Program| {
        let errors::Error::BadCheckpoint(message) = told(program.call().open("model".to_owned()))
        else {
            panic!("it is something else");
        };
        assert!(!message.contains("secret"), "{message}");
        message
    };
    told_so(&mut program);
    std::fs::create_dir(&secret).unwrap();
    told_so(&mut program);
    std::fs::write(secret.join("model.safetensors"), [0xff; 100]).unwrap();
    assert_eq!(told_so(&mut program), "it is not a valid checkpoint");
}

#[test]
fn tensors_come_in_batches_and_are_found_by_name() {
    let directory = checkpoint();
    let mut program = with_model(directory.path(), MIB);
    let open = program.open("model");
    assert_eq!(program.call().tensor_count(again(&open)).unwrap(), 4);
    let names = |program: &mut Program, first, count| -> Vec<String> {
        let tensors = program.call().tensors(again(&open), first, count).unwrap();
        tensors.into_iter().map(|tensor| tensor.name).collect()
    };
    let all = ["matrix", "single", "ids", "large"];
    assert_eq!(names(&mut program, 0, u32::MAX), all);
    assert_eq!(names(&mut program, 1, 2), all[1..3]);
    assert_eq!(names(&mut program, 3, 9), all[3..]);
    for (first, count) in [(4, 1), (u32::MAX, u32::MAX), (0, 0)] {
        assert!(names(&mut program, first, count).is_empty());
    }
    let find =
        |program: &mut Program, name: &str| program.call().find(again(&open), name.to_owned());
    assert_eq!(find(&mut program, "ids").unwrap(), Some(2));
    assert_eq!(find(&mut program, "Ids").unwrap(), None);
    assert!(program.call().ties(again(&open), 0, 10).unwrap().is_empty());
    assert_eq!(program.call().config_json(again(&open)).unwrap(), "{}");
}

#[test]
fn any_range_of_a_tensor_can_be_read() {
    let directory = checkpoint();
    let mut program = with_model(directory.path(), 16 * MIB);
    let open = program.open("model");
    let large = &sources()[3].bytes;
    let length = large.len() as u64;
    let buffer = program.allocate(1, length + 3);
    let read = |program: &mut Program, tensor, start, bytes, offset| {
        let call = &mut program.call();
        call.read_tensor(again(&open), tensor, start, bytes, again(&buffer), offset)
    };
    done(read(&mut program, 3, 0, length, 3));
    assert_eq!(program.bytes(&buffer)[3..], large[..]);
    done(read(&mut program, 3, length - 5, 5, 0));
    assert_eq!(program.bytes(&buffer)[..5], large[large.len() - 5..]);
    for (tensor, start, bytes, offset) in [
        (4, 0, 1, 0),
        (u32::MAX, 0, 0, 0),
        (3, 0, length + 1, 0),
        (3, length, 1, 0),
        (3, u64::MAX, 2, 0),
        (3, 0, length, 4),
        (2, 0, 1, u64::MAX),
    ] {
        invalid(read(&mut program, tensor, start, bytes, offset));
    }
}

#[test]
fn a_file_that_is_cut_short_is_told() {
    let directory = checkpoint();
    let mut program = with_model(directory.path(), 16 * MIB);
    let open = program.open("model");
    let file = std::fs::File::options()
        .write(true)
        .open(directory.path().join("model.safetensors"))
        .unwrap();
    file.set_len(1 << 20).unwrap();
    let buffer = program.allocate(0, 8 * MIB);
    let length = sources()[3].bytes.len() as u64;
    let result = program
        .call()
        .read_tensor(again(&open), 3, 0, length, again(&buffer), 0);
    let errors::Error::BadCheckpoint(message) = told(result) else {
        panic!("it is something else");
    };
    assert!(message.contains("cut short"), "{message}");
    // Opened again while it is still open, it is the same; once it is not, it is looked at again.
    let second = program.open("model");
    for handle in [open, second] {
        program.close(handle);
    }
    assert!(matches!(
        told(program.call().open("model".to_owned())),
        errors::Error::BadCheckpoint(_)
    ));
}

#[test]
fn files_that_say_how_text_becomes_tokens_are_read_and_no_others() {
    let directory = checkpoint();
    let bytes: Vec<u8> = (0..5 * MIB).map(|i| (i % 251) as u8).collect();
    std::fs::write(directory.path().join("tokenizer.json"), &bytes).unwrap();
    std::fs::write(directory.path().join("secret.json"), "{}").unwrap();
    let mut program = with_model(directory.path(), MIB);
    let open = program.open("model");
    let length = |program: &mut Program, name: &str| {
        program
            .call()
            .companion_bytes(again(&open), name.to_owned())
    };
    let read = |program: &mut Program, name: &str, start, bytes| {
        let name = name.to_owned();
        program
            .call()
            .read_companion(again(&open), name, start, bytes)
    };
    assert_eq!(
        done(length(&mut program, "tokenizer.json")),
        Some(bytes.len() as u64)
    );
    let half = done(read(&mut program, "tokenizer.json", 3, 4 * MIB));
    assert_eq!(half, bytes[3..][..4 << 20]);
    assert_eq!(
        done(read(&mut program, "tokenizer.json", 5 * MIB, 0)),
        [0u8; 0]
    );
    for (start, bytes) in [
        (0, 5 * MIB),
        (5 * MIB, 1),
        (u64::MAX, 1),
        (1, u64::MAX),
        (0, 4 * MIB + 1),
    ] {
        invalid(read(&mut program, "tokenizer.json", start, bytes));
    }
    // One that is not there, and what is none of them.
    assert_eq!(done(length(&mut program, "merges.txt")), None);
    assert!(matches!(
        told(read(&mut program, "merges.txt", 0, 0)),
        errors::Error::NotFound(_)
    ));
    for name in [
        "secret.json",
        "model.safetensors",
        "",
        "..",
        "../tokenizer.json",
        "./tokenizer.json",
        "/etc/passwd",
    ] {
        let message = invalid(length(&mut program, name));
        assert!(message.contains("tokenizer.json"), "{message}");
        invalid(read(&mut program, name, 0, 0));
    }
}

#[test]
fn a_file_beside_the_weights_is_a_small_file_in_the_checkpoint() {
    let (directory, elsewhere) = (checkpoint(), TempDir::new().unwrap());
    let mut program = with_model(directory.path(), MIB);
    let open = program.open("model");
    let path = |name: &str| directory.path().join(name);
    let large = std::fs::File::create(path("vocab.json")).unwrap();
    large.set_len(64 * MIB + 1).unwrap();
    std::fs::create_dir(path("merges.txt")).unwrap();
    #[cfg_attr(not(unix), expect(unused_mut, reason = "there are fewer"))]
    let mut cases = vec![("vocab.json", "67108865"), ("merges.txt", "directory")];
    #[cfg(unix)]
    {
        let secret = elsewhere.path().join("secret");
        std::fs::write(&secret, "{}").unwrap();
        std::os::unix::fs::symlink(&secret, path("tokenizer.json")).unwrap();
        cases.push(("tokenizer.json", "leads out"));
    }
    for (name, words) in cases {
        let result = program
            .call()
            .companion_bytes(again(&open), name.to_owned());
        let errors::Error::BadCheckpoint(message) = told(result) else {
            panic!("{name} is something else");
        };
        assert!(message.contains(words), "{message}");
        let elsewhere = elsewhere.path().to_string_lossy().into_owned();
        assert!(!message.contains(&elsewhere), "{message}");
    }
}
