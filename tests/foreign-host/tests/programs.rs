//! A program does in a foreign host what it does in Tightfit's own runner.

use tightfit_foreign_host::ProgramHost;
use tightfit_tests::programs::{Bench, HOSTILE, hostile};

#[tokio::test]
async fn an_asynchronous_host_with_wasi_runs_programs() {
    let bench = Bench::default();
    let host = ProgramHost::new(HOSTILE).unwrap();
    for arguments in [
        &["honest"][..],
        &["load"],
        &["load-and-forget"],
        &["never-free"],
    ] {
        let owned: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
        let answer = host.run(bench.context(), &owned).await.unwrap().unwrap();
        assert_eq!(answer, bench.answer(hostile(), arguments), "{arguments:?}");
    }
    let command = ["open".to_owned(), "/".to_owned()];
    let told = host.run(bench.context(), &command).await;
    let told = told.unwrap().unwrap_err();
    assert_eq!(told, bench.told(hostile(), &["open", "/"]));
    let error = host
        .run(bench.context(), &["panic-with-model".to_owned()])
        .await;
    assert!(error.is_err());
    bench.is_unharmed();
}
