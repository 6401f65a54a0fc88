//! A wasmtime host that has nothing to do with Tightfit but its interfaces: its own engine, its own
//! store data, WASI in the same linker, synchronous or asynchronous.
#![forbid(unsafe_code)]

mod programs;

pub use programs::ProgramHost;

use tightfit::policy::{Answer, Description, Policy, PolicyError, Request};
use tightfit::status::Status;
use tightfit_wasm::component_from_module;
use tightfit_wasm::wit::{Planner, TightfitCtx, TightfitView, add_to_linker};
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime::{Config, Engine, Result, Store};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

/// This host's own store data.
pub struct Data {
    wasi: WasiCtx,
    table: ResourceTable,
    tightfit: TightfitCtx,
}

impl WasiView for Data {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView {
            ctx: &mut self.wasi,
            table: &mut self.table,
        }
    }
}

impl TightfitView for Data {
    fn tightfit(&mut self) -> &mut TightfitCtx {
        &mut self.tightfit
    }
}

/// An engine with a component and a linker that has WASI and Tightfit's interfaces.
pub struct Host {
    engine: Engine,
    component: Component,
    linker: Linker<Data>,
}

impl Host {
    /// Compiles a policy, a component or a core module. With `asynchronous`, WASI's functions suspend instead of blocking.
    ///
    /// # Errors
    /// When the bytes are neither.
    pub fn new(bytes: &[u8], asynchronous: bool) -> Result<Host> {
        let mut config = Config::new();
        config.consume_fuel(true);
        let engine = Engine::new(&config)?;
        let mut linker = Linker::new(&engine);
        match asynchronous {
            true => wasmtime_wasi::p2::add_to_linker_async(&mut linker)?,
            false => wasmtime_wasi::p2::add_to_linker_sync(&mut linker)?,
        }
        add_to_linker(&mut linker)?;
        Ok(Host {
            component: Component::from_binary(&engine, &component_from_module(bytes)?)?,
            engine,
            linker,
        })
    }

    /// A store for one guest, with the fuel that this host gives.
    ///
    /// # Errors
    /// None that are expected: the engine counts fuel.
    pub fn store(&self) -> Result<Store<Data>> {
        let data = Data {
            wasi: WasiCtx::builder().build(),
            table: ResourceTable::new(),
            tightfit: TightfitCtx::new(),
        };
        let mut store = Store::new(&self.engine, data);
        store.set_fuel(1_000_000_000)?;
        Ok(store)
    }

    /// The policy, ready to be called.
    ///
    /// # Errors
    /// When it cannot be instantiated or is none.
    pub fn planner(&self) -> Result<(Store<Data>, Planner)> {
        let mut store = self.store()?;
        let instance = self.linker.instantiate(&mut store, &self.component)?;
        let planner = Planner::new(&mut store, &instance)?;
        Ok((store, planner))
    }

    /// The policy in a store that yields to the executor every so often.
    ///
    /// # Errors
    /// As [`Host::planner`].
    pub async fn planner_async(&self) -> Result<(Store<Data>, Planner)> {
        let mut store = self.store()?;
        store.fuel_async_yield_interval(Some(10_000))?;
        let instance = self
            .linker
            .instantiate_async(&mut store, &self.component)
            .await?;
        let planner = Planner::new(&mut store, &instance)?;
        Ok((store, planner))
    }
}

/// With this, [`tightfit::plan::propose`] and [`tightfit::reserve`] ask the foreign host.
impl Policy for Host {
    fn describe(&self) -> Result<Description, PolicyError> {
        self.planner()
            .and_then(|(store, planner)| planner.describe(store))
            .map_err(failed)
    }

    fn plan(&self, request: &Request<'_>) -> Result<Answer, PolicyError> {
        let answer = self
            .planner()
            .and_then(|(store, planner)| planner.plan(store, request))
            .map_err(failed)?;
        match answer {
            Ok(proposal) => Ok(Answer {
                proposal,
                fuel: None,
            }),
            Err(refusal) => Err(PolicyError::Refused {
                policy: "foreign".to_owned(),
                refusal,
            }),
        }
    }
}

fn failed(error: wasmtime::Error) -> PolicyError {
    PolicyError::Failed {
        policy: "foreign".to_owned(),
        status: Status::Policy,
        source: format!("{error:#}").into(),
    }
}
